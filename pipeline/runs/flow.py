"""The flow of stages: data -> dense -> prune -> evaluate -> export -> report.

Keys follow from the configuration alone, so the whole flow is known before anything runs.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.context import never
from pipeline.data.stage import pinned_data
from pipeline.errors import StageError, is_storage_failure
from pipeline.models.source import pinned_model
from pipeline.runs.config import RunConfig
from pipeline.runs.hardware import is_settled
from pipeline.runs.stage import InputFolders, PlannedStage, Stage, StageContext
from pipeline.runs.stages.data import DATA
from pipeline.runs.stages.dense import DENSE
from pipeline.runs.stages.evaluate import EVALUATE
from pipeline.runs.stages.export import EXPORT
from pipeline.runs.stages.one_shot import ONE_SHOT
from pipeline.runs.stages.prune import PRUNE
from pipeline.runs.stages.report import REPORT
from pipeline.storage.node_copies import release
from pipeline.storage.outputs import OutputFiles
from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.store.checkpoints import CheckpointStore
from pipeline.store.parts import discard_parts, parts_folder
from pipeline.tasks.row_mapper import num_processes
from pipeline.tracking.recorder import Progress
from pipeline.worker_group import WorkerGroup

# In order. A run has one of the two that prune.
STAGES: tuple[Stage, ...] = (DATA, DENSE, PRUNE, ONE_SHOT, EVALUATE, EXPORT, REPORT)


def plan_stages(config: RunConfig, *, pruned: bool = True) -> list[PlannedStage]:
    """Return the stages of a run in order, with the key of each.

    Args:
        config: of the run.
        pruned: with pruning; False leaves the dense fine-tune and its evaluation.
    """
    assert is_settled(config), "hardware decides: see pipeline.runs.hardware"
    planned: dict[str, PlannedStage] = {}
    for stage in STAGES:
        if not stage.is_part_of(config) or (stage.for_pruned and not pruned):
            continue
        inputs = tuple(name for name in stage.inputs(config) if pruned or name != PRUNE.name)
        key, params = stage.plan(config, {name: planned[name].key for name in inputs})
        planned[stage.name] = PlannedStage(
            name=stage.name,
            key=key,
            params=params,
            inputs=inputs,
            on_all_workers=stage.on_all_workers,
        )
    return list(planned.values())


def pinned(config: RunConfig) -> RunConfig:
    """Return a run with the commits that its revisions stand for now: keys stay as they are.

    What runs elsewhere or later then loads what the keys name, and asks the hub for no revision.

    Raises:
        ConfigError: if the hub does not say.
    """
    changes = {"model": pinned_model(config.model), "data": pinned_data(config.data)}
    teacher = config.distill.model(config.model) if config.distill else None
    if config.distill is not None and teacher is not None:
        revision = pinned_model(teacher).revision
        changes["distill"] = config.distill.model_copy(update={"revision": revision})
    return config.model_copy(update=changes)


def run_stage(
    planned: PlannedStage,
    config: RunConfig,
    store: ArtifactStore,
    inputs: Mapping[str, Artifact],
    *,
    workers: WorkerGroup | None,
    progress: Progress,
    log: Callable[[], str] | None = None,
    cores: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Artifact | None:
    """Run one stage in this process.

    Args:
        planned: what to run.
        config: of the run.
        store: where its output goes.
        inputs: the artifacts of the stages before it.
        workers: all of them, for a stage that has them.
        progress: called with records for people to watch.
        log: gives what this process has printed; every worker's is kept in `logs/`.
        cores: that a stage without workers may use; all of this machine's unless given.
        stop: tells on the main worker whether work that is kept step by step is to end after this step.

    Returns:
        Its committed output, where this process is the main one.

    Raises:
        RunStoppedError: if it ended so, its steps saved.
    """
    started = time.monotonic()
    stage = stage_of(planned, config)
    group = workers or WorkerGroup.alone()
    checkpoints = CheckpointStore(
        f"{store.folder_of(planned.name, planned.key)}/checkpoints",
        group,
        keep=config.train.checkpoints_kept,
        notify=lambda text: progress({"event": "note", "text": text}),
        patience=config.cluster.timeout_seconds,
    )
    parts = parts_folder(store, planned.name, planned.key)
    try:
        attempt = None
        if group.is_main:
            attempt = store.begin(planned.name, planned.key, planned.params, inputs)
        files = OutputFiles(group.broadcast(attempt.url if attempt else None))
        context = StageContext(
            inputs=InputFolders(inputs),
            model_kwargs=_model_kwargs(inputs),
            output=attempt.folder if attempt else Path(),
            workers=group,
            checkpoints=checkpoints,
            progress=progress,
            files=files,
            is_to_stop=stop or never,
            config=config,
            params=planned.params,
            artifacts=inputs,
            parts=parts,
            cores=cores or num_processes(stage.num_cpus(config)),
        )
        metrics = stage.run(context)
        if workers is not None and log is not None:
            _keep_logs(workers, log(), context.output)
        written = group.gather(files.written)
        if attempt is None or written is None:
            return None
        for entries in written:
            attempt.add(entries)
        artifact = attempt.commit(metrics, time.monotonic() - started)
    except Exception as error:
        if not is_storage_failure(error):
            raise
        raise StageError(
            f"stage {planned.name} could not write to {store.url}: {error}; what was finished before "
            "is good: make room, or make it writable, and run the same command again"
        ) from error
    finally:
        release()
    checkpoints.discard()
    discard_parts(parts)
    return artifact


def stage_of(planned: PlannedStage, config: RunConfig) -> Stage:
    """Return the stage that a planned one is."""
    return next(s for s in STAGES if s.name == planned.name and s.is_part_of(config))


def _model_kwargs(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return what the data asks of the model; JSON made strings of the label numbers."""
    if DATA.name not in inputs:
        return {}
    kwargs = dict(inputs[DATA.name].metrics["model_kwargs"])
    if "id2label" in kwargs:
        kwargs["id2label"] = {int(i): name for i, name in kwargs["id2label"].items()}
    return kwargs


def _keep_logs(workers: WorkerGroup, text: str, output: Path) -> None:
    """Write what each worker printed to the main worker's folder; its own machine may soon be gone."""
    texts = workers.gather(text)
    if texts is None:
        return
    (output / "logs").mkdir()
    for rank, log in enumerate(texts):
        (output / "logs" / f"rank-{rank}.log").write_text(log, encoding="utf-8")
