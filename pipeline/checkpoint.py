"""A training run's state on disk, and taking it up again."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mgpp import Pruner
from pipeline.checkpoint_store import Manifest
from pipeline.errors import StageError
from pipeline.gang import Gang
from pipeline.recorder import METRICS_FILE

_TAG = "engine"


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
    gang: Gang,
    zero_stage: int,
) -> None:
    """Write this worker's part of the state; all workers must call.

    DeepSpeed writes model and optimizer shards; the pruner's counters and packed masks go to a file
    of their own, because DeepSpeed's formats would widen or drop them. The main worker adds the
    records so far, which a later attempt goes on with.
    """
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
    if pruner is not None:
        torch.save(pruner.state_dict(), folder / _pruner_file(gang.rank))
    if records is not None:
        shutil.copyfile(records, folder / METRICS_FILE)
    if gang.is_main:
        state = {**asdict(done), "zero_stage": zero_stage}
        (folder / "state.json").write_text(json.dumps(state))


def load_engine(
    folder: Path, *, engine: Any, manifest: Manifest, gang: Gang, zero_stage: int
) -> TrainingState:
    """Load model and optimizer; return how far the run had come.

    Raises:
        StageError: if the checkpoint is of another world size or ZeRO stage.
    """
    state = json.loads((folder / "state.json").read_text())
    for name, was, now in (
        ("cluster.num_workers", manifest.world_size, gang.world_size),
        ("zero.stage", state.pop("zero_stage"), zero_stage),
    ):
        if was != now:
            raise StageError(
                f"the checkpoint of step {manifest.step} was written with {name}={was} and cannot be "
                f"loaded with {name}={now}: go on with {was}, or delete the stage's checkpoints "
                "folder to start again"
            )
    engine.load_checkpoint(str(folder), tag=_TAG)
    return TrainingState(**state)


def load_records(folder: Path) -> str:
    """Return the records up to the checkpoint."""
    path = folder / METRICS_FILE
    return path.read_text(encoding="utf-8") if path.exists() else ""


def load_pruner(folder: Path, *, pruner: Pruner, gang: Gang) -> None:
    """Load this worker's masks and counters."""
    pruner.load_state_dict(torch.load(folder / _pruner_file(gang.rank), weights_only=True))


def _pruner_file(rank: int) -> str:
    return f"pruner-rank{rank:05d}.pt"
