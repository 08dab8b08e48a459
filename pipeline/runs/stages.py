"""Each stage of a run, given its inputs' artifacts and a folder to write to."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.data import stage as data
from pipeline.errors import StageError, is_storage_failure
from pipeline.evaluation import evaluate
from pipeline.export import checkpoint as export
from pipeline.models.loading import ModelConfig, load_tokenizer
from pipeline.models.weights import WEIGHTS_FILE
from pipeline.pruning import one_shot
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage
from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import Task, make_task
from pipeline.tracking.recorder import METRICS_FILE, Progress, read_records
from pipeline.training import loop as train
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import DTYPES
from pipeline.training.teacher import TeacherSpec
from pipeline.worker_group import WorkerGroup

_PACKAGES = ("mgpp", "torch", "deepspeed", "ray", "transformers", "datasets")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage is run with besides the configuration.

    Attributes:
        inputs: artifacts of the stages before it.
        output: folder to write to (of the main worker).
        workers: all of them, for a stage that has them.
        checkpoints: where a training stage keeps its state; None for a stage without workers.
        progress: called with records for people to watch.
    """

    inputs: dict[str, Artifact]
    output: Path
    workers: WorkerGroup | None
    checkpoints: CheckpointStore | None
    progress: Progress


def run_stage(
    stage: Stage,
    config: RunConfig,
    store: ArtifactStore,
    inputs: dict[str, Artifact],
    *,
    workers: WorkerGroup | None,
    progress: Progress,
    log: Callable[[], str] | None = None,
) -> Artifact | None:
    """Run one stage in this process.

    Args:
        stage: what to run.
        config: of the run.
        store: where its output goes.
        inputs: the artifacts of the stages before it.
        workers: all of them, for a stage that has them.
        progress: called with records for people to watch.
        log: gives what this process has printed; every worker's is kept in `logs/`.

    Returns:
        Its committed output, where this process is the main one.
    """
    started = time.monotonic()
    checkpoints = None
    if workers is not None:
        checkpoints = CheckpointStore(
            f"{store.folder_of(stage.name, stage.key)}/checkpoints",
            workers,
            keep=config.train.checkpoints_kept,
            notify=lambda text: progress({"event": "note", "text": text}),
        )
    try:
        main = workers is None or workers.is_main
        attempt = store.begin(stage.name, stage.key, stage.params, inputs) if main else None
        context = Context(
            inputs=inputs,
            output=attempt.folder if attempt else Path(),
            workers=workers,
            checkpoints=checkpoints,
            progress=progress,
        )
        metrics = _RUN[stage.name](config, context)
        if workers is not None and log is not None:
            _keep_logs(workers, log(), context.output)
        if attempt is None:
            return None
        artifact = attempt.commit(metrics, time.monotonic() - started)
    except Exception as error:
        if not is_storage_failure(error):
            raise
        raise StageError(
            f"stage {stage.name} could not write to {store.url}: {error}; what was finished before is "
            "good: make room, or make it writable, and run the same command again"
        ) from error
    if checkpoints is not None:
        checkpoints.discard()
    return artifact


def _keep_logs(workers: WorkerGroup, text: str, output: Path) -> None:
    """Write what each worker printed to the main worker's folder; its own machine may soon be gone."""
    texts = workers.gather(text)
    if texts is None:
        return
    (output / "logs").mkdir()
    for rank, log in enumerate(texts):
        (output / "logs" / f"rank-{rank}.log").write_text(log, encoding="utf-8")


def _run_data(config: RunConfig, context: Context) -> dict[str, Any]:
    return data.prepare_data(
        config.data, make_task(config.task), load_tokenizer(config.model), context.output
    )


def _run_dense(config: RunConfig, context: Context) -> dict[str, Any]:
    settings = config.dense.train_config(config.train)
    return _train(config, config.model, context, settings, pruned=False)


def _run_prune(config: RunConfig, context: Context) -> dict[str, Any]:
    model, teaching = config.model, None
    if config.prune.start == "dense":
        model = _dense_model(config, context)
    if config.prune.one_shot is not None:
        return _run_one_shot(config, model, context)
    if config.distill is not None:
        teacher = config.distill.model(config.model) or _dense_model(config, context)
        teaching = TeacherSpec(config=config.distill, model=teacher)
    return _train(config, model, context, config.train, pruned=True, teacher=teaching)


def _run_one_shot(config: RunConfig, model: ModelConfig, context: Context) -> dict[str, Any]:
    assert context.workers is not None
    assert context.checkpoints is not None
    return one_shot.prune_one_shot(
        model_config=model,
        task=make_task(config.task),
        prune=config.prune,
        dtype=DTYPES[config.zero.precision],
        seed=config.train.seed,
        data=context.inputs["data"].path,
        model_kwargs=_model_kwargs(context.inputs["data"]),
        output=context.output,
        workers=context.workers,
        checkpoints=context.checkpoints,
        progress=context.progress,
    )


def _dense_model(config: RunConfig, context: Context) -> ModelConfig:
    changes: dict[str, Any] = {
        "path": str(context.inputs["dense"].path / "model"),
        "revision": None,
        "gguf_file": None,
        "overrides": {},
        "random_init": False,
    }
    return config.model.model_copy(update=changes)


def _train(
    config: RunConfig,
    model: ModelConfig,
    context: Context,
    settings: TrainConfig,
    *,
    pruned: bool,
    teacher: TeacherSpec | None = None,
) -> dict[str, Any]:
    assert context.workers is not None
    assert context.checkpoints is not None
    return train.train(
        model_config=model,
        task=make_task(config.task),
        config=settings,
        zero=config.zero,
        prune=config.prune if pruned else None,
        teacher=teacher,
        data=context.inputs["data"].path,
        model_kwargs=_model_kwargs(context.inputs["data"]),
        output=context.output,
        workers=context.workers,
        checkpoints=context.checkpoints,
        progress=context.progress,
    )


def _run_evaluate(config: RunConfig, context: Context) -> dict[str, Any]:
    assert context.workers is not None
    names = {"dense": "dense", "prune": "pruned"}
    return dict(
        evaluate.evaluate(
            models={
                label: context.inputs[stage].path / "model"
                for stage, label in names.items()
                if stage in context.inputs
            },
            task=make_task(config.task),
            config=config.evaluate,
            zero=config.zero,
            data=context.inputs["data"].path,
            trust_remote_code=config.model.trust_remote_code,
            workers=context.workers,
            progress=context.progress,
        )
    )


def _run_export(config: RunConfig, context: Context) -> dict[str, Any]:
    pruned = context.inputs["prune"]
    figures = pruned.metrics
    method = config.prune.method.model_dump(mode="json")
    scheduled = {k: figures[k] for k in ("prune_start", "prune_end", "num_steps", "num_prunable")}
    folder = pruned.path
    return export.export_model(
        trained=folder / "model",
        weights=export.read_weights(folder, WEIGHTS_FILE),
        auto_model=make_task(config.task).auto_model,
        pruning={
            "model": config.model.path,
            "method": method,
            "sparsity": figures["sparsity"],
            "num_pruned": figures["num_pruned"],
            "mask_hash": figures["mask_hash"],
            "scope": config.prune.scope,
            **config.prune.placement_given(),
            **scheduled,
            "tool": f"mgpp {version('mgpp')}",
        },
        card={
            "name": config.name,
            "model": config.model.path,
            "method": config.prune.method.name,
            "sparsity": figures["sparsity"],
            "num_pruned": figures["num_pruned"],
            "metrics": _written(make_task(config.task), context.inputs["evaluate"].metrics),
            "num_rows": min(
                context.inputs["data"].metrics["num_rows"]["validation"],
                config.evaluate.max_rows or sys.maxsize,
            ),
            "config": config.to_yaml(),
            "versions": _versions(),
            **scheduled,
        },
        config=config.export,
        trust_remote_code=config.model.trust_remote_code,
        output=context.output,
    )


def _run_report(config: RunConfig, context: Context) -> dict[str, Any]:
    from pipeline.reports.run import ReportData, render_report  # plotly is slow to import

    pruned, exported = context.inputs["prune"], context.inputs["export"]
    task = make_task(config.task)
    records = read_records(pruned.path / METRICS_FILE)
    dense = context.inputs.get("dense")
    page = render_report(
        ReportData(
            name=config.name,
            model=config.model.path,
            method=config.prune.method.name,
            metric=task.headline,
            kinds={
                name: task.metric(name) for name in context.inputs["evaluate"].metrics["pruned"]
            },
            metrics=context.inputs["evaluate"].metrics,
            sparsity=exported.metrics["sparsity"],
            num_pruned=exported.metrics["num_zeros"],
            num_prunable=exported.metrics["num_prunable"],
            num_parameters=exported.metrics["num_parameters"],
            sizes=model_sizes(context.inputs),
            seconds={name: artifact.seconds for name, artifact in context.inputs.items()},
            steps=records.get("step", []),
            dense_steps=read_records(dense.path / METRICS_FILE).get("step", []) if dense else [],
            prunings=records.get("prune", []),
            layers=records.get("layers", []),
            phases={k: pruned.metrics[k] for k in ("prune_start", "prune_end", "num_steps")},
            config=config.to_yaml(),
            versions=_versions(),
        )
    )
    (context.output / "report.html").write_text(page, encoding="utf-8")
    return {"bytes": len(page.encode())}


_RUN: dict[str, Callable[[RunConfig, Context], dict[str, Any]]] = {
    "data": _run_data,
    "dense": _run_dense,
    "prune": _run_prune,
    "evaluate": _run_evaluate,
    "export": _run_export,
    "report": _run_report,
}


def model_sizes(artifacts: dict[str, Artifact]) -> dict[str, int]:
    """Return the bytes of each model's weights on disk."""

    def size(artifact: Artifact) -> int:
        return sum(
            entry["bytes"]
            for name, entry in artifact.files.items()
            if name.endswith(".safetensors")
        )

    labels = {"dense": "dense model", "export": "pruned model"}
    return {label: size(artifacts[name]) for name, label in labels.items() if name in artifacts}


def _model_kwargs(artifact: Artifact) -> dict[str, Any]:
    """Return what the data asks of the model; JSON made strings of the label numbers."""
    kwargs = dict(artifact.metrics["model_kwargs"])
    if "id2label" in kwargs:
        kwargs["id2label"] = {int(i): name for i, name in kwargs["id2label"].items()}
    return kwargs


def _written(task: Task, metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    """Return the metrics of each model as text."""
    return {
        kind: {name: task.metric(name).text(value) for name, value in of.items()}
        for kind, of in metrics.items()
    }


def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}
