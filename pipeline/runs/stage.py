"""The flow of stages: what each needs, and what names its output.

    data -> dense -> prune -> evaluate -> export -> report

Keys follow from the configuration alone, so the whole flow is known before anything runs.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.data import stage as data
from pipeline.evaluation import evaluate
from pipeline.export import checkpoint as export
from pipeline.models.loading import model_identity
from pipeline.pruning import one_shot
from pipeline.runs.config import RunConfig
from pipeline.store.artifacts import make_key
from pipeline.tasks import make_task
from pipeline.training import loop as train
from pipeline.training.config import TrainConfig

_REPORT_VERSION = 1
# Settings of training that do not change what comes out, but for rounding.
_NOT_IN_KEY = {
    "micro_batch_size",
    "log_every",
    "checkpoint_every",
    "checkpoints_kept",
    "max_skipped_steps",
    "gradient_checkpointing",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of the flow.

    Attributes:
        name: of the stage, and of the folder of its artifacts.
        key: names its output.
        params: what of the configuration went into the key.
        inputs: the stages whose artifacts it reads.
        workers: whether it runs on all workers together.
    """

    name: str
    key: str
    params: dict[str, Any]
    inputs: tuple[str, ...]
    on_all_workers: bool


def plan_stages(config: RunConfig, *, pruned: bool = True) -> list[Stage]:
    """Return the stages of a run in order, with the key of each.

    Args:
        config: of the run.
        pruned: with pruning; False leaves the dense fine-tune and its evaluation.
    """
    model = model_identity(config.model)
    precision = config.zero.model_dump(mode="json", include={"precision", "grad_accum_dtype"})
    settings = _train_identity(config.train)
    dense = _train_identity(config.dense.train_config(config.train))
    scoring = set(config.task.only_scoring)
    models = tuple(
        name for name, wanted in (("dense", config.dense.enabled), ("prune", pruned)) if wanted
    )
    specs: list[tuple[str, int, dict[str, Any], tuple[str, ...], bool]] = [
        (
            "data",
            data.VERSION,
            {
                "data": data.data_identity(config.data),
                "task": config.task.model_dump(mode="json", exclude=scoring),
                "tokenizer": {k: model[k] for k in ("path", "revision", "gguf_file")},
            },
            (),
            False,
        ),
        ("dense", train.VERSION, {"model": model, "train": dense, **precision}, ("data",), True),
        (
            "prune",
            train.VERSION if config.prune.one_shot is None else one_shot.VERSION,
            {
                "model": model,
                "prune": config.prune.identity(),
                **(
                    {"train": settings, **precision, **_distill_identity(config)}
                    if config.prune.one_shot is None
                    else {"seed": config.train.seed, "precision": config.zero.precision}
                ),
            },
            ("data", "dense") if _prune_needs_dense(config) else ("data",),
            True,
        ),
        (
            "evaluate",
            evaluate.VERSION,
            {
                "evaluate": config.evaluate.model_dump(mode="json"),
                "task": config.task.model_dump(mode="json", include=scoring - {"metric"}),
                **precision,
            },
            ("data", *models),
            True,
        ),
        (
            "export",
            export.VERSION,
            {"export": config.export.model_dump(mode="json"), "name": config.name},
            ("data", "prune", "evaluate"),
            False,
        ),
        (
            "report",
            _REPORT_VERSION,
            {"name": config.name, "metric": make_task(config.task).headline},
            ("data", *models, "evaluate", "export"),
            False,
        ),
    ]
    keys: dict[str, str] = {}
    stages = []
    for name, code_version, params, inputs, on_all_workers in specs:
        if name == "dense" and not config.dense.enabled:
            continue
        if name in ("prune", "export", "report") and not pruned:
            continue
        keys[name] = make_key(name, code_version, params, {i: keys[i] for i in inputs})
        stages.append(
            Stage(
                name=name,
                key=keys[name],
                params=params,
                inputs=inputs,
                on_all_workers=on_all_workers,
            )
        )
    return stages


def _train_identity(config: TrainConfig) -> dict[str, Any]:
    """Return what of the training's settings names its output.

    Grouping is among them only where it is on, so that artifacts made before there was such a setting
    keep their keys.
    """
    off = set() if config.group_by_length else {"group_by_length"}
    return config.model_dump(mode="json", exclude=_NOT_IN_KEY | off)


def _prune_needs_dense(config: RunConfig) -> bool:
    """Whether pruning starts from the dense fine-tune, or learns from it."""
    learns = config.distill is not None and config.distill.model(config.model) is None
    return config.prune.start == "dense" or learns


def _distill_identity(config: RunConfig) -> dict[str, Any]:
    """Return what names a distillation; the dense fine-tune is an input, and named as one."""
    if config.distill is None:
        return {}
    teacher = config.distill.model(config.model)
    weights = config.distill.model_dump(mode="json", exclude={"teacher", "revision"})
    return {
        "distill": {"teacher": model_identity(teacher) if teacher else "dense", **weights},
    }
