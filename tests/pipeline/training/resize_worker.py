"""Run on ranks: saves checkpoints in one layout, or goes on from them in another.

resize_worker save <bert> <data> <out>     every saved layout: an undisturbed run, and stopped ones
resize_worker resume <bert> <data> <out>   what is to be resumed on as many ranks as there are
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from mgpp import Pruner
from pipeline.section import Duration
from pipeline.training import checkpoint
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases
from tests.pipeline.training.train_worker import (
    TRAIN,
    InterruptedRunError,
    StoppingCheckpoints,
    prune_by,
    run,
)

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked
SAVED_BY = 2
GRADUAL, FIXED = 9, 17  # steps at which a run stops
# Batches of 12 rows go evenly to 1, 2 and 3 ranks. The bias of attention's keys has no gradient but
# rounding noise, which Adam turns into whole steps.
CONFIG = TRAIN.model_copy(
    update={
        "length": Duration(20),
        "batch_size": 12,
        "log_every": 1,
        "freeze": ["*.key.bias"],
        "eps": 1e-4,
    }
)
STOPS = {"stage1": (GRADUAL,), "stage2": (GRADUAL,), "stage3": (GRADUAL, FIXED)}
METHOD_OF = {"stage1": "movement", "stage2": "soft-movement"}
# (saved by the layout, at the step, resumed on so many ranks, in the layout)
RESUMED: list[tuple[str, int, int, str]] = [
    *((stage, stop, ranks, stage) for stage in STOPS for stop in STOPS[stage] for ranks in (1, 3)),
    ("stage1", GRADUAL, 2, "stage0"),
    ("stage2", GRADUAL, 2, "stage3-small"),
    ("stage3", GRADUAL, 2, "stage2-offload"),
    ("stage3", GRADUAL, 3, "stage1"),
]


def resumed_name(case: str, stop: int, ranks: int, into: str) -> str:
    """Name one of RESUMED."""
    return f"{case}-{stop}-{ranks}-{into}"


def folder_of(out: Path, case: str, stop: int, ranks: int, into: str) -> Path:
    """Where a resumed run writes."""
    return out / resumed_name(case, stop, ranks, into)


def whole_masks(pruner: Pruner, workers: WorkerGroup) -> dict[str, np.ndarray] | None:
    """Return the masks of all whole weights on the main rank."""
    held = [(s.name, s.full_numel, s.offset, pruner.mask(s).numpy()) for s in pruner.shards]
    parts = workers.gather(held)
    if parts is None:
        return None
    masks: dict[str, np.ndarray] = {}
    for name, full_numel, offset, mask in (piece for part in parts for piece in part):
        masks.setdefault(name, np.zeros(full_numel, bool))[offset : offset + mask.size] = mask
    return masks


@contextmanager
def masks_kept(owner: Any, name: str, path: Path) -> Iterator[None]:
    """Have a function that is given the pruner write the masks as they are when it was called."""
    original = getattr(owner, name)

    def wrapped(*args: Any, pruner: Pruner, **kwargs: Any) -> Any:
        result = original(*args, pruner=pruner, **kwargs)
        masks = whole_masks(pruner, WorkerGroup.current())
        if masks is not None:
            np.savez(path, **masks)
        return result

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, original)


def save(case: str, bert: Path, data: Path, out: Path) -> None:
    """Train whole, and stopped."""
    prune = prune_by(METHOD_OF.get(case, "mgpp"))
    checkpoints = StoppingCheckpoints(f"{out / case}-checkpoints", WorkerGroup.current())
    run(case, bert, data, out / case, checkpoints, config=CONFIG, prune=prune)
    for stop in STOPS[case]:
        folder = out / f"{case}-{stop}"
        checkpoints = StoppingCheckpoints(f"{folder}-checkpoints", WorkerGroup.current())
        checkpoints.stop_at = stop
        kept = masks_kept(checkpoint, "Snapshot", Path(f"{folder}-masks.npz"))
        with kept, suppress(InterruptedRunError):
            run(case, bert, data, folder, checkpoints, config=CONFIG, prune=prune)


def resume(case: str, stop: int, into: str, bert: Path, data: Path, out: Path) -> None:
    """Go on from a checkpoint in a layout and on the ranks there are."""
    workers = WorkerGroup.current()
    folder = folder_of(out, case, stop, workers.world_size, into)
    if workers.is_main:
        shutil.copytree(out / f"{case}-{stop}-checkpoints", f"{folder}-checkpoints")
    workers.barrier()
    checkpoints = StoppingCheckpoints(f"{folder}-checkpoints", workers)
    prune = prune_by(METHOD_OF.get(case, "mgpp"))
    with masks_kept(checkpoint.Restored, "apply", Path(f"{folder}-masks.npz")):
        run(into, bert, data, folder, checkpoints, config=CONFIG, prune=prune)


def main(which: str, *arguments: str) -> None:
    dist.init_process_group("gloo")
    paths = [Path(argument) for argument in arguments]
    if which == "save":
        cases = {case: partial(save, case, *paths) for case in STOPS}
    else:
        cases = {
            resumed_name(case, stop, ranks, into): partial(resume, case, stop, into, *paths)
            for case, stop, ranks, into in RESUMED
            if ranks == dist.get_world_size()
        }
    run_cases(paths[-1], cases, seconds=100)
