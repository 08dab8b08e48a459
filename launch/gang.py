"""Stages on a gang of workers, which Ray Train places and restarts."""

from dataclasses import asdict
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launch.worker import work
from pipeline import config as run_config
from pipeline.artifacts import Artifact, ArtifactStore
from pipeline.errors import ConfigError, StageError
from pipeline.stage_keys import Stage

_RAY_FOLDER = "ray"


def run_on_gang(
    stages: list[Stage],
    config: run_config.RunConfig,
    store: ArtifactStore,
    inputs: dict[str, Artifact],
    board: Any,
) -> None:
    """Run stages, one after the other, on all workers together; returns when all are committed.

    They share one gang because starting its processes takes longer than many a stage.

    Args:
        stages: what to run, in order.
        config: of the run.
        store: where artifacts go.
        inputs: the artifacts that are there already, by stage.
        board: the actor that is told of progress and failure.

    Raises:
        StageError, ConfigError: as the stage raised it.
        TrainingFailedError: if the gang failed more often than `cluster.max_failures`.
    """
    cluster = config.cluster
    # Ray Train's own record of the run. It is not gone on from: the stages' checkpoints say all.
    folder = store.folder_of(stages[0].name, stages[0].key)
    store.discard(f"{folder}/{_RAY_FOLDER}")
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "stages": [asdict(stage) for stage in stages],
            "config": config.model_dump(mode="json"),
            "storage": store.url,
            "inputs": {name: asdict(artifact) for name, artifact in inputs.items()},
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
            placement_strategy=cluster.placement,
        ),
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=cluster.timeout_seconds,
        ),
        run_config=RunConfig(
            name=_RAY_FOLDER,
            storage_path=folder,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
        ),
    )
    try:
        trainer.fit()
    finally:
        failure = ray.get(board.failure.remote())
        if failure is not None:
            kind, detail = failure
            raise ConfigError(detail) if kind == "config" else StageError(detail)
    store.discard(f"{folder}/{_RAY_FOLDER}")
