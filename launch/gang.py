"""A stage on a gang of workers: Ray Train places them, restarts them and keeps their checkpoints."""

from dataclasses import asdict
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launch.worker import work
from pipeline import config as run_config
from pipeline.artifacts import Artifact, ArtifactStore
from pipeline.errors import ConfigError, StageError
from pipeline.stages import Stage

_CHECKPOINTS = "checkpoints"
_CHECKPOINTS_KEPT = 2


def run_on_gang(
    stage: Stage,
    config: run_config.RunConfig,
    store: ArtifactStore,
    inputs: dict[str, Artifact],
    board: Any,
) -> None:
    """Run a stage on all workers together; returns when it is done and committed.

    Raises:
        StageError, ConfigError: as the stage raised it.
        TrainingFailedError: if the gang failed more often than `cluster.max_failures`.
    """
    cluster = config.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "stage": asdict(stage),
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
            name=_CHECKPOINTS,
            storage_path=store.folder_of(stage.name, stage.key),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=_CHECKPOINTS_KEPT),
        ),
    )
    try:
        trainer.fit()
    finally:
        failure = ray.get(board.failure.remote())
        if failure is not None:
            kind, detail = failure
            raise ConfigError(detail) if kind == "config" else StageError(detail)
    store.discard(f"{store.folder_of(stage.name, stage.key)}/{_CHECKPOINTS}")
