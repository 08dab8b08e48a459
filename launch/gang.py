"""A stage on a gang of workers: Ray Train places them, restarts them and keeps their checkpoints."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import config as run_config
from pipeline.artifacts import Artifact, ArtifactStore
from pipeline.errors import ConfigError, StageError
from pipeline.gang import Gang
from pipeline.stages import Stage, run_stage

_CHECKPOINTS = "checkpoints"


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
        RuntimeError: if the gang failed more often than `cluster.max_failures`.
    """
    cluster = config.cluster
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "stage": stage,
            "config": config,
            "storage": store.url,
            "inputs": inputs,
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": cluster.cpus_per_worker,
                **({"GPU": 1} if cluster.gpus_per_worker else {}),
            },
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
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
    finally:
        failure = ray.get(board.failure.remote())
        if failure is not None:
            kind, detail = failure
            raise ConfigError(detail) if kind == "config" else StageError(detail)


def _work(settings: dict[str, Any]) -> None:
    """One worker's part."""
    board = settings["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # restarted after a failure that trying again cannot mend
    gang = Gang.current()

    def progress(record: dict[str, Any]) -> None:
        if gang.is_main:
            board.post.remote(record)

    try:
        run_stage(
            settings["stage"],
            settings["config"],
            ArtifactStore(settings["storage"]),
            settings["inputs"],
            gang=gang,
            checkpoints=_RayCheckpoints(),
            progress=progress,
        )
    except ConfigError as error:
        ray.get(board.fail.remote("config", error.problems))
        raise
    except StageError as error:
        ray.get(board.fail.remote("stage", str(error)))
        raise


class _RayCheckpoints:
    """Every worker's part is reported to Ray Train, which keeps the whole in the run's storage."""

    def save(self, write: Callable[[Path], None], step: int) -> None:
        with tempfile.TemporaryDirectory(prefix="mgpp-checkpoint-") as folder:
            write(Path(folder))
            ray_train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        checkpoint = ray_train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)
