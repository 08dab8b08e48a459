"""A training run's state in storage, and restoring it, on any number of workers.

Not DeepSpeed's own checkpoints: those are of one world size and ZeRO stage, and would widen or drop the
masks. Here each worker writes its shards of the float32 master weights, of the optimizer's state and of
the masks by parameter name and range: 12 bytes a trained parameter with Adam, 1/8 a prunable one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor, nn

from mgpp import Pruner
from mgpp.backends import deepspeed
from mgpp.tensor_file import write_tensors
from pipeline.store.checkpoints import CheckpointFiles, SavedCheckpoint
from pipeline.tracking.recorder import METRICS_FILE
from pipeline.training.checkpoint_shards import ShardReader, ShardWriter
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


class Snapshot:
    """This worker's part of the state after a step, as references until it is copied.

    The main worker's has what is the same on all: counters, buffers, and the records so far, which a
    later attempt resumes with.

    Args:
        engine: what `deepspeed.initialize` returned.
        pruner: of the run, if it prunes.
        records: the file of the records so far; the main worker's.
        done: how far the run has come.
        workers: all of them.
    """

    def __init__(
        self,
        *,
        engine: Any,
        pruner: Pruner | None,
        records: Path | None,
        done: TrainingState,
        workers: WorkerGroup,
    ) -> None:
        self._shards = ShardWriter(workers.rank)
        if workers.is_main or engine.zero_optimization_stage() > 0:  # at stage 0 all hold the same
            self._shards.add_trained(deepspeed.training_state(engine))
            self._shards.add_masks(pruner.masks_in_place() if pruner else ())
        self._small: dict[str, bytes] = {}
        self._buffers: dict[str, Tensor] = {}
        if records is not None:
            self._small[METRICS_FILE] = records.read_bytes()
        if workers.is_main:
            self._buffers = _buffers(engine.module)
            state = {
                "done": asdict(done),
                "pruner": pruner.counters() if pruner else None,
                "deepspeed": deepspeed.engine_counters(engine),
            }
            self._small[_STATE_FILE] = json.dumps(state).encode()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: what a copy takes."""
        return self._shards.num_bytes + sum(buffer.nbytes for buffer in self._buffers.values())

    def copy_to_host(self) -> None:
        """Copy all tensors to the host's memory, so that the training may change them meanwhile."""
        self._shards.copy_to_host()
        self._buffers = {name: b.to("cpu", copy=True) for name, b in self._buffers.items()}

    def write(self, files: CheckpointFiles) -> None:
        """Write it to storage, a few MiB at a time."""
        self._shards.write(files)
        if self._buffers:
            with files.file(_BUFFERS_FILE) as stream:
                write_tensors(stream, self._buffers)
        for name, data in self._small.items():
            files.put(name, data)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was read of a checkpoint beside the master weights and the optimizer's state.

    Attributes:
        done: how far the run had come.
        records: its records so far; the main worker's.
    """

    done: TrainingState
    records: str
    _counters: dict[str, Any]
    _pruner: dict[str, Any] | None
    _buffers: dict[str, Tensor]

    def apply(self, *, engine: Any, pruner: Pruner | None) -> None:
        """Restore the rest; all workers must call."""
        deepspeed.copy_to_low_precision(engine)
        for name, buffer in _buffers(engine.module).items() if self._buffers else ():
            buffer.copy_(self._buffers[name])
        deepspeed.load_engine_counters(engine, self._counters)
        if pruner is not None:
            assert self._pruner is not None
            pruner.load_state_dict(self._pruner)


def read(
    saved: SavedCheckpoint, *, engine: Any, pruner: Pruner | None, workers: WorkerGroup
) -> Restored:
    """Read this worker's part, whatever the layout it was saved from; asks no other worker.

    Master weights and optimizer state go to where they belong, all of them; the rest is returned.
    """
    shards = ShardReader(saved, first=workers.rank)
    deepspeed.load_masters(engine, shards.trained)
    state = json.loads(saved.read(_STATE_FILE))
    masks = [
        mask
        for held in (pruner.shards if pruner else ())
        if held.numel
        for mask in shards.masks(held.name, held.offset, held.numel)
    ]
    files = saved.manifest.files
    has_records = workers.is_main and METRICS_FILE in files
    return Restored(
        done=TrainingState(**state["done"]),
        records=saved.read(METRICS_FILE).decode() if has_records else "",
        _counters=state["deepspeed"],
        _pruner={**state["pruner"], "masks": masks} if pruner else None,
        _buffers=load(saved.read(_BUFFERS_FILE)) if _BUFFERS_FILE in files else {},
    )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the model's state, such as running means."""
    kept = model.state_dict(keep_vars=True)
    return {n: b.detach() for n, b in model.named_buffers() if n in kept}
