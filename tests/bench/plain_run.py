"""Run by torchrun: all stages of a run, one after the other, without Ray."""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist

from pipeline.runs.flow import plan_stages, run_stage
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.runs.validate import validate
from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.worker_group import WorkerGroup
from tests.processes import leave


def main(config: str, *overrides: str) -> None:
    """Run the stages; those that need no worker group on the first rank."""
    dist.init_process_group("gloo")
    workers = WorkerGroup.current()
    settings = settled(validate(config, overrides, None), NO_GPUS)
    store = ArtifactStore(str(Path(settings.storage).resolve()))
    artifacts: dict[str, Artifact] = {}
    for stage in plan_stages(settings):
        made = None
        if stage.on_all_workers or workers.is_main:
            inputs = {name: artifacts[name] for name in stage.inputs}
            whole = workers if stage.on_all_workers else None
            made = run_stage(
                stage, settings, store, inputs, workers=whole, progress=lambda record: None
            )
        artifacts[stage.name] = workers.broadcast(made)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
