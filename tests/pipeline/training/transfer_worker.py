"""Run on one rank: a model is pruned and exported, then trained on another task, zeros kept.

transfer_worker <upstream.yaml> <transfer.yaml> <out>
"""

import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist

from pipeline.errors import ConfigError
from pipeline.pruning.config import METHOD_CONFIGS, PruneSection
from pipeline.runs.flow import plan_stages, run_stage
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.runs.validate import validate
from pipeline.store.artifacts import ArtifactStore
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases
from tests.pipeline.training.train_worker import InterruptedRunError, StoppingCheckpoints, run

PRUNE = PruneSection(method=METHOD_CONFIGS["sparse-transfer"](name="sparse-transfer"))
# Pruned further, beyond the 60% of upstream; its first prunings ask for less than that.
FURTHER = PruneSection(
    sparsity=0.8, initial_sparsity=0.2, start_after=3, finetune=5, interval=3, keep_zeros=True
)
STOP = 9
# (where a run goes on that was stopped under ZeRO 2)
RESUMED = ("stage2", "stage3")
CASES = ("both", "refused", "whole", "further", *RESUMED)


def run_file(path: str) -> dict[str, Any]:
    """Run all stages of a configuration on this worker group."""
    workers = WorkerGroup.current()
    config = settled(validate(path, [], None), NO_GPUS)
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


def run_both(upstream: str, transfer: str, out: Path) -> None:
    """Run the two configurations one after the other."""
    try:
        validate(transfer, [], None)
    except ConfigError as error:
        before = [str(problem) for problem in error.problems]
    found: dict[str, Any] = {"before": before}
    found["upstream"] = {n: a.url for n, a in run_file(upstream).items()}
    made = run_file(transfer)
    found["transfer"] = {n: a.url for n, a in made.items()}
    found["path"] = validate(transfer, [], None).model.path
    found["keys"] = [
        stage.key for stage in plan_stages(settled(validate(transfer, [], None), NO_GPUS))
    ]
    (out / "found.json").write_text(json.dumps(found))


def upstream_artifact(out: Path, stage: str) -> Path:
    return Path(json.loads((out / "found.json").read_text())["upstream"][stage])


def refuse(bert: Path, out: Path) -> None:
    """Train a model that was not pruned upstream, and one that was pruned too far."""
    checkpoints = StoppingCheckpoints(f"{out}/none", WorkerGroup.current())
    data = upstream_artifact(out, "data")
    pruned = upstream_artifact(out, "export") / "model"
    too_few = FURTHER.model_copy(update={"sparsity": 0.5})
    refused = []
    for model, prune in ((bert, PRUNE), (bert, FURTHER), (pruned, too_few)):
        try:
            run("stage2", model, data, out / "dense", checkpoints, prune=prune)
        except ConfigError as error:
            refused += [str(problem) for problem in error.problems]
    (out / "refused.json").write_text(json.dumps(refused))


def exported(out: Path) -> tuple[Path, Path]:
    """Return the exported model, and the rows."""
    return upstream_artifact(out, "export") / "model", upstream_artifact(out, "data")


def whole_and_stopped(
    out: Path, prune: PruneSection, *, whole: str, stopped: str, part: str
) -> StoppingCheckpoints:
    """Train the exported model whole, and stopped; return the checkpoints of the latter."""
    workers = WorkerGroup.current()
    undisturbed = StoppingCheckpoints(f"{out}/none", workers)
    run("stage2", *exported(out), out / whole, undisturbed, prune=prune)
    stopping = StoppingCheckpoints(f"{out}/{stopped}", workers)
    stopping.stop_at = STOP
    with suppress(InterruptedRunError):
        run("stage2", *exported(out), out / part, stopping, prune=prune)
    return stopping


def train_whole_and_stopped(out: Path) -> None:
    """Train with the zeros kept: whole, and stopped."""
    whole_and_stopped(out, PRUNE, whole="whole", stopped="stopped", part="part")


def train_further(out: Path) -> None:
    """Prune the exported model further: whole, and stopped and resumed."""
    names = {"whole": "further", "stopped": "further-stopped", "part": "further-part"}
    stopping = whole_and_stopped(out, FURTHER, **names)
    stopping.stop_at = None
    figures = run("stage2", *exported(out), out / "further-resumed", stopping, prune=FURTHER)
    (out / "further-resumed" / "figures.json").write_text(json.dumps(figures))


def resume(layout: str, out: Path) -> None:
    """Resume in a layout what was stopped."""
    shutil.copytree(out / "stopped", out / f"{layout}-checkpoints")
    resuming = StoppingCheckpoints(f"{out}/{layout}-checkpoints", WorkerGroup.current())
    figures = run(layout, *exported(out), out / layout, resuming, prune=PRUNE)
    (out / layout / "figures.json").write_text(json.dumps(figures))


def main(upstream: str, transfer: str, out: str) -> None:
    dist.init_process_group("gloo")
    run_cases(
        Path(out),
        {
            "both": partial(run_both, upstream, transfer, Path(out)),
            "refused": partial(refuse, Path(upstream).with_name("bert"), Path(out)),
            "whole": partial(train_whole_and_stopped, Path(out)),
            "further": partial(train_further, Path(out)),
            **{layout: partial(resume, layout, Path(out)) for layout in RESUMED},
        },
        seconds=200,
    )
