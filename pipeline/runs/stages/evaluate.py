"""The evaluate stage: the dense and the pruned model scored on the validation rows."""

from typing import Any

from pipeline.evaluation.evaluate import evaluate
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every, only
from pipeline.section import Section
from pipeline.tasks import TaskConfig, make_task
from pipeline.training.zero_extra import extra_in_key

_LABELS = {"dense": "dense", "prune": "pruned"}  # stage -> what its model is called in the metrics


def _for_scoring(task: type[Section]) -> frozenset[str]:
    assert issubclass(task, TaskConfig)
    return task.only_scoring - {"metric"}  # all metrics are computed, whichever leads


class EvaluateStage(Stage):
    """Scores the models of a run."""

    name = "evaluate"
    version = 3
    settings = {
        "evaluate": every,
        "task": _for_scoring,
        "zero": only("precision"),
    }
    on_all_workers = True

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the data and the models there are."""
        return ("data", "dense", "prune") if config.dense.enabled else ("data", "prune")

    def content(self, config: RunConfig) -> dict[str, Any]:
        """Return what further keys of DeepSpeed's configuration the scores may depend on."""
        return {"zero": extra_in_key(config.zero.extra)}

    def run(self, context: StageContext) -> dict[str, Any]:
        """Return the metrics by model."""
        config = context.config
        metrics = evaluate(
            context,
            models={
                label: context.inputs[stage] / "model"
                for stage, label in _LABELS.items()
                if stage in context.inputs
            },
            task=make_task(config.task),
            config=config.evaluate,
            zero=config.zero,
            trust_remote_code=config.model.trust_remote_code,
        )
        return dict(metrics)


EVALUATE = EvaluateStage()
