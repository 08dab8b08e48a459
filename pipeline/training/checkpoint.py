"""A training run's state on disk, and restoring it, on any number of workers.

Not DeepSpeed's own checkpoints: those are of one world size and ZeRO stage, and would widen or drop the
masks. Here each worker writes its shards of the float32 master weights, of the optimizer's state and of
the masks by parameter name and range: 12 bytes a trained parameter with Adam, 1/8 a prunable one.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mgpp import Pruner
from mgpp.backends import deepspeed
from pipeline.store.checkpoints import SavedCheckpoint
from pipeline.tracking.recorder import METRICS_FILE
from pipeline.training.checkpoint_shards import ShardReader, ShardWriter, index_writers
from pipeline.worker_group import WorkerGroup

_STATE_FILE = "state.json"
_BUFFERS_FILE = "buffers.safetensors"


@dataclass(kw_only=True)
class TrainingState:
    """How far a run has come.

    Attributes:
        steps: updates of the weights.
        batches: batches drawn for them.
        skipped: batches left out because their gradient was not finite.
    """

    steps: int = 0
    batches: int = 0
    skipped: int = 0


def write_checkpoint(
    folder: Path,
    *,
    engine: Any,
    pruner: Pruner | None,
    records: Path | None,
    done: TrainingState,
    workers: WorkerGroup,
) -> None:
    """Write this worker's part of the state; all workers must call.

    The main worker adds what is the same on all: counters, buffers, and the records so far, which a
    later attempt resumes with.
    """
    masks = pruner.state_dict() if pruner else None
    if workers.is_main or engine.zero_optimization_stage() > 0:  # at stage 0 all hold the same
        writer = ShardWriter(folder, workers.rank)
        writer.add_trained(deepspeed.training_state(engine))
        writer.add_masks(masks.pop("masks") if masks else ())
        writer.close()
    if records is not None:
        shutil.copyfile(records, folder / METRICS_FILE)
    if workers.is_main:
        if buffers := _buffers(engine.module):
            save_file(buffers, folder / _BUFFERS_FILE)
        state = {
            "done": asdict(done),
            "pruner": masks,
            "deepspeed": deepspeed.engine_counters(engine),
        }
        (folder / _STATE_FILE).write_text(json.dumps(state))


def load_engine(saved: SavedCheckpoint, *, engine: Any, workers: WorkerGroup) -> TrainingState:
    """Load model and optimizer, whatever the layout they were saved from; all workers must call.

    Returns:
        How far the run had come.
    """
    with _shards(saved, workers) as shards:
        deepspeed.load_training_state(engine, shards.trained)
    if _BUFFERS_FILE in saved.manifest.files:
        loaded = load_file(saved.file(_BUFFERS_FILE))
        for name, buffer in _buffers(engine.module).items():
            buffer.copy_(loaded[name])
    state = json.loads(saved.file(_STATE_FILE).read_text())
    deepspeed.load_engine_counters(engine, state["deepspeed"])
    return TrainingState(**state["done"])


def load_pruner(saved: SavedCheckpoint, *, pruner: Pruner, workers: WorkerGroup) -> None:
    """Load this worker's masks and the counters; all workers must call."""
    state = json.loads(saved.file(_STATE_FILE).read_text())["pruner"]
    with _shards(saved, workers) as shards:
        held = (shard for shard in pruner.shards if shard.numel)
        masks = (m for s in held for m in shards.masks(s.name, s.offset, s.numel))
        pruner.load_state_dict({**state, "masks": masks})


def load_records(saved: SavedCheckpoint) -> str:
    """Return the records up to the checkpoint."""
    if METRICS_FILE not in saved.manifest.files:
        return ""
    return saved.file(METRICS_FILE).read_text(encoding="utf-8")


def _shards(saved: SavedCheckpoint, workers: WorkerGroup) -> ShardReader:
    return ShardReader(saved.file, index_writers(saved.manifest.files, first=workers.rank))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the model's state, such as running means."""
    kept = model.state_dict(keep_vars=True)
    return {n: b.detach() for n, b in model.named_buffers() if n in kept}
