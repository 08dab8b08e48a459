"""Run by torchrun: a model is pruned upstream, exported, and trained on another task with its zeros kept.

transfer_worker <upstream.yaml> <transfer.yaml> <out>
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist

from pipeline.errors import ConfigError
from pipeline.pruning.config import METHOD_CONFIGS, PruneSection
from pipeline.runs.flow import plan_stages, run_stage
from pipeline.runs.validate import validate
from pipeline.store.artifacts import ArtifactStore
from pipeline.worker_group import WorkerGroup
from tests.pipeline.training.train_worker import InterruptedRunError, StoppingCheckpoints, run
from tests.processes import leave

PRUNE = PruneSection(method=METHOD_CONFIGS["sparse-transfer"](name="sparse-transfer"))
STOP = 9
# (where a run goes on that was stopped under ZeRO 2)
RESUMED = ("stage2", "stage3")


def run_file(path: str) -> dict[str, Any]:
    """Run all stages of a configuration on this worker group."""
    workers = WorkerGroup.current()
    config = validate(path, [], None)
    store = ArtifactStore(config.storage)
    made: dict[str, Any] = {}
    for stage in plan_stages(config):
        if stage.on_all_workers or workers.is_main:
            inputs = {name: made[name] for name in stage.inputs}
            place = workers if stage.on_all_workers else None
            run_stage(stage, config, store, inputs, workers=place, progress=lambda record: None)
        workers.barrier()
        made[stage.name] = store.find(stage.name, stage.key)
    return made


def interrupted(bert: Path, data: Path, out: Path) -> None:
    """Train with the zeros kept: whole, and stopped and gone on with."""
    workers = WorkerGroup.current()
    run(
        "stage2",
        bert,
        data,
        out / "whole",
        StoppingCheckpoints(f"{out}/none", workers),
        prune=PRUNE,
    )
    stopping = StoppingCheckpoints(f"{out}/stopped", workers)
    stopping.stop_at = STOP
    try:
        run("stage2", bert, data, out / "part", stopping, prune=PRUNE)
    except InterruptedRunError:
        workers.barrier()
    for layout in RESUMED:
        if workers.is_main:
            shutil.copytree(out / "stopped", out / f"{layout}-checkpoints")
        workers.barrier()
        resuming = StoppingCheckpoints(f"{out}/{layout}-checkpoints", workers)
        figures = run(layout, bert, data, out / layout, resuming, prune=PRUNE)
        if workers.is_main:
            (out / layout / "figures.json").write_text(json.dumps(figures))


def main(upstream: str, transfer: str, out: str) -> None:
    dist.init_process_group("gloo")
    try:
        validate(transfer, [], None)
    except ConfigError as error:
        before = error.problems
    found: dict[str, Any] = {"before": before}
    found["upstream"] = {n: a.url for n, a in run_file(upstream).items()}
    made = run_file(transfer)
    found["transfer"] = {n: a.url for n, a in made.items()}
    found["path"] = validate(transfer, [], None).model.path
    found["keys"] = [stage.key for stage in plan_stages(validate(transfer, [], None))]
    dense = Path(found["upstream"]["data"])
    try:
        run(
            "stage2",
            Path(sys.argv[1]).parent / "bert",
            dense,
            Path(out) / "dense",
            StoppingCheckpoints(f"{out}/none", WorkerGroup.current()),
            prune=PRUNE,
        )
    except ConfigError as error:
        found["not pruned"] = error.problems
    interrupted(Path(found["upstream"]["export"]) / "model", dense, Path(out))
    if dist.get_rank() == 0:
        (Path(out) / "found.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
