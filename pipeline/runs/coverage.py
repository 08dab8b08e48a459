"""How much of a run's model is prunable, from its configuration alone."""

from mgpp import Coverage, coverage_of
from pipeline.models.settings import build_empty
from pipeline.runs.config import RunConfig
from pipeline.tasks import make_task


def planned_coverage(config: RunConfig) -> Coverage:
    """Return how much of a run's model is prunable.

    Raises:
        ConfigError: if the model's configuration cannot be read.
        ValueError: if a pattern matches nothing.
    """
    model = config.model.model_copy(update={"random_init": True})  # weights are not read
    empty = build_empty(model, make_task(config.task).auto_model)
    settings = config.prune.settings
    return coverage_of(empty, settings.select(empty), settings.exclude)
