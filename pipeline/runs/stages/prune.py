"""The prune stage of methods that prune while the model trains."""

from typing import Any

from pipeline.models.source import model_identity
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every, only
from pipeline.runs.stages.dense import (
    dense_model,
    micro_batches_of_routers,
    starting_model,
)
from pipeline.section import Section
from pipeline.tasks import make_task
from pipeline.training.loop import train
from pipeline.training.teacher import TeacherSpec, in_terms_of_teacher
from pipeline.training.zero_extra import extra_in_key


def _but_teacher(distill: type[Section]) -> set[str]:
    return set(distill.model_fields) - {"teacher", "revision"}  # named by content


class PruneStage(Stage):
    """Trains and prunes the model."""

    name = "prune"
    version = 3
    settings = {
        "model": every,
        "prune": every,
        "train": every,
        "zero": only("precision", "gradients"),
        "distill": _but_teacher,
    }
    on_all_workers = True
    for_pruned = True

    def is_part_of(self, config: RunConfig) -> bool:
        """Return whether the method prunes while it trains."""
        return config.prune.one_shot is None

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the data, and the dense fine-tune where the model starts or learns from it."""
        learns = config.distill is not None and config.distill.model(config.model) is None
        return ("data", "dense") if config.prune.start_from == "dense" or learns else ("data",)

    def content(self, config: RunConfig) -> dict[str, Any]:
        """Return what names the weights of the model and of its teacher; the dense one is an input."""
        found: dict[str, Any] = {
            "model": model_identity(config.model),
            "train": micro_batches_of_routers(config),
            "zero": extra_in_key(config.zero.extra),
        }
        if config.distill is not None:
            teacher = config.distill.model(config.model)
            with in_terms_of_teacher():
                found["distill"] = {"teacher": model_identity(teacher) if teacher else "dense"}
        return found

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the pruned model and its records."""
        config = context.config
        teacher = None
        if config.distill is not None:
            model = config.distill.model(config.model) or dense_model(context)
            teacher = TeacherSpec(config=config.distill, model=model)
        return train(
            context,
            model_config=starting_model(context),
            task=make_task(config.task),
            config=config.train,
            zero=config.zero,
            prune=config.prune,
            teacher=teacher,
        )


PRUNE = PruneStage()
