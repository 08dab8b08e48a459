"""Stages on a worker group, which Ray Train places and restarts."""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from launch.cluster.connect import cluster_capacity
from launch.workers.controller import Restarts, WorkerGroupConfig, last_line
from launch.workers.worker import work
from pipeline.errors import ConfigError, RunStoppedError, StageError
from pipeline.runs import config as run_config
from pipeline.runs.stage import PlannedStage
from pipeline.runs.stages.dense import DENSE
from pipeline.runs.stages.one_shot import ONE_SHOT
from pipeline.runs.stages.prune import PRUNE
from pipeline.storage.filesystems import is_local, open_storage
from pipeline.storage.node_copies import DamagedArtifactError
from pipeline.store.artifacts import Artifact, ArtifactStore

_RAY_FOLDER = "ray"
_ANSWER_SECONDS = 10.0


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, without its own answer to SIGINT, which ends the driver without a word."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave the signal to whoever handles it."""


class _NodeDrainedError(Exception):
    """A node of the worker group will go; the steps so far are saved."""


_FAILURES: dict[str, Callable[[Any], Exception]] = {
    "config": ConfigError,
    "stage": StageError,
    "stopped": RunStoppedError,
    "drained": _NodeDrainedError,
}


def run_on_workers(
    stages: list[PlannedStage],
    config: run_config.RunConfig,
    store: ArtifactStore,
    inputs: dict[str, Artifact],
    status: Any,
) -> None:
    """Run stages, one after the other, on all workers together; returns when all are committed.

    They share one worker group because starting its processes takes longer than many a stage does. If
    other work occupies the cluster, they wait for it.

    Args:
        stages: what to run, in order.
        config: of the run.
        store: where artifacts go.
        inputs: the artifacts that are there already, by stage.
        status: the actor that progress and failures are posted to.

    Raises:
        StageError, ConfigError, DamagedArtifactError: as the stage raised it.
        StageError: if the worker group failed more often than `cluster.max_failures`, or found no room in
            `cluster.wait_seconds`.
        RunStoppedError: if it ended as it was asked to.
    """
    num_workers = config.cluster.num_workers
    while True:
        try:
            return _run_once(stages, config, store, inputs, status, num_workers)
        except _NodeDrainedError as error:
            ray.get(status.restart.remote("node drained", str(error)))
        except TrainingFailedError as error:
            fewer = _fewer_workers(config, num_workers)
            if fewer is not None:
                text = f"resuming with {fewer} workers instead of {num_workers}"
                ray.get(status.restart.remote("node lost", f"{last_line(error)}; {text}"))
                num_workers = fewer
            elif _must_wait(error, config.cluster, num_workers):
                text = f"waiting for {num_workers} workers: other work occupies the cluster"
                ray.get(status.post.remote({"event": "note", "text": text}))
            else:
                raise StageError(_reason(error, config.cluster, num_workers)) from error


def _run_once(
    stages: list[PlannedStage],
    config: run_config.RunConfig,
    store: ArtifactStore,
    inputs: dict[str, Artifact],
    status: Any,
    num_workers: int,
) -> None:
    """Run stages on so many workers; those restarted in place are as many."""
    cluster = config.cluster
    # Ray Train's own record of the run. It is not resumed from: the stages' checkpoints hold everything.
    folder = store.folder_of(stages[0].name, stages[0].key)
    store.discard(f"{folder}/{_RAY_FOLDER}")
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus:
        resources["GPU"] = 1
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.wait_seconds)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.timeout_seconds)
    filesystem, path = open_storage(folder)
    read = {name for stage in stages for name in stage.inputs}
    trainer = _Trainer(
        work,
        train_loop_config={
            "stages": [asdict(stage) for stage in stages],
            "config": config.model_dump(mode="json"),
            "storage": store.url,
            "inputs": {name: asdict(artifact) for name, artifact in inputs.items()},
            "status": status,
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=cluster.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=cluster.placement,
        ),
        torch_config=WorkerGroupConfig(
            backend="nccl" if cluster.gpus else "gloo",
            timeout_s=cluster.timeout_seconds,
            models=_models(stages, config),
            artifacts=tuple(asdict(a) for name, a in inputs.items() if name in read),
        ),
        run_config=RunConfig(
            name=_RAY_FOLDER,
            storage_path=path,
            storage_filesystem=None if is_local(filesystem) else _arrow(filesystem),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=1
            ),
            callbacks=[Restarts(status)],
        ),
    )
    try:
        trainer.fit()
    except Exception:
        _raise_failure(status)
        raise
    _raise_failure(status)
    store.discard(f"{folder}/{_RAY_FOLDER}")


def _raise_failure(status: Any) -> None:
    """Raise what ended the workers' stages early, if anything did, as they said it."""
    try:
        failure = ray.get(status.take_failure.remote(), timeout=_ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return  # it is lost, too: what came of the workers tells why
    if failure is None:
        return
    kind, detail = failure
    if kind == "damaged":
        raise DamagedArtifactError(*detail)
    raise _FAILURES[kind](detail)


def _models(stages: list[PlannedStage], config: run_config.RunConfig) -> tuple[dict[str, Any], ...]:
    """Return the models that these stages start from or learn from, as plain values."""
    if not {stage.name for stage in stages} & {DENSE.name, PRUNE.name, ONE_SHOT.name}:
        return ()
    teacher = config.distill.model(config.model) if config.distill else None
    return tuple(m.model_dump(mode="json") for m in (config.model, teacher) if m is not None)


def _fewer_workers(config: run_config.RunConfig, num_workers: int) -> int | None:
    """Return how many workers fit now, if fewer are allowed; None if room is not the cause."""
    cluster = config.cluster
    if cluster.min_workers is None:
        return None
    room = _room(cluster)
    if room >= num_workers:
        return None
    sizes = range(room, cluster.min_workers - 1, -1)
    return next((size for size in sizes if config.train.goes_with(size)), None)


def _room(cluster: run_config.ClusterConfig) -> int:
    """Return how many workers the cluster can hold as it is now, all of it theirs."""
    return cluster_capacity().num_workers(cluster.cpus_per_worker, cluster.gpus)


def _must_wait(
    error: TrainingFailedError, cluster: run_config.ClusterConfig, num_workers: int
) -> bool:
    """Return whether a worker group did not start because other work occupies what it needs."""
    if not _found_no_room(error) or _room(cluster) < num_workers:
        return False
    free = ray.available_resources()
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus}
    return any(free.get(name, 0) < each[name] * num_workers for name in each)


def _found_no_room(error: TrainingFailedError) -> bool:
    failure = getattr(error, "controller_failure", None)
    return type(failure).__name__ == "WorkerGroupStartupTimeoutError"  # no public name of Ray


def _reason(error: TrainingFailedError, cluster: run_config.ClusterConfig, num_workers: int) -> str:
    """Return why a worker group failed for good, in the configuration's terms, and what to do."""
    resume = "rerun the same command to resume from the last checkpoint"
    if _found_no_room(error):
        return (
            f"{num_workers} workers did not start within cluster.wait_seconds ({cluster.wait_seconds}); "
            f"there is room for {_room(cluster)} now. When there is room, {resume}; or set "
            "cluster.min_workers to run with fewer"
        )
    failures = sorted(getattr(error, "worker_failures", {}).items())
    if not failures:
        return f"Ray Train could not run the workers; {resume}\n{error}"
    rank, failure = failures[0]
    return (
        f"workers failed more often than cluster.max_failures ({cluster.max_failures}) allows; "
        f"rank {rank}: {last_line(failure)}. Fix the cause, then {resume}\n{error}"
    )


def _arrow(filesystem: Any) -> Any:
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(filesystem))
