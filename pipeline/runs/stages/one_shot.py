"""The prune stage of methods that prune once and train nothing."""

from typing import Any

from pipeline.models.source import model_identity
from pipeline.pruning.one_shot import prune_one_shot
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every, only
from pipeline.runs.stages.dense import starting_model
from pipeline.tasks import make_task


class OneShotStage(Stage):
    """Prunes the model layer by layer; those after it do not see which of the two stages it was."""

    name = "prune"
    version = 3
    settings = {"model": every, "prune": every, "train": only("seed"), "zero": only("precision")}
    on_all_workers = True
    for_pruned = True

    def is_part_of(self, config: RunConfig) -> bool:
        """Return whether the method prunes once."""
        return config.prune.one_shot is not None

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the data, and the dense fine-tune where that is pruned."""
        return ("data", "dense") if config.prune.start_from == "dense" else ("data",)

    def content(self, config: RunConfig) -> dict[str, Any]:
        """Return what names the model's weights."""
        return {"model": model_identity(config.model)}

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the pruned model and its records."""
        config = context.config
        return prune_one_shot(
            context,
            model_config=starting_model(context),
            task=make_task(config.task),
            prune=config.prune,
            dtype=config.zero.dtype,
            seed=config.train.seed,
        )


ONE_SHOT = OneShotStage()
