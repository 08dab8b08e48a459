"""The dense stage: the fine-tune that the pruned model is held against."""

from typing import Any

from pipeline.models.settings import load_model_config
from pipeline.models.source import ModelConfig, model_identity
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every, only
from pipeline.tasks import make_task
from pipeline.training.loop import train
from pipeline.training.zero_extra import extra_in_key


class DenseStage(Stage):
    """Trains the model without pruning."""

    name = "dense"
    version = 3
    settings = {"model": every, "train": every, "zero": only("precision", "gradients")}
    on_all_workers = True
    compared = {"dense model": "model"}

    def is_part_of(self, config: RunConfig) -> bool:
        """Return whether the dense fine-tune is enabled."""
        return config.dense.enabled

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the data stage."""
        return ("data",)

    def effective(self, config: RunConfig) -> RunConfig:
        """Return the configuration with this fine-tune's own length and rate."""
        return config.model_copy(update={"train": config.dense.train_config(config.train)})

    def content(self, config: RunConfig) -> dict[str, Any]:
        """Return what names the model's weights, and how they are trained where it matters."""
        return {
            "model": model_identity(config.model),
            "train": micro_batches_of_routers(config),
            "zero": extra_in_key(config.zero.extra),
        }

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the trained model and its records."""
        config = self.effective(context.config)
        return train(
            context,
            model_config=config.model,
            task=make_task(config.task),
            config=config.train,
            zero=config.zero,
            prune=None,
        )


def micro_batches_of_routers(config: RunConfig) -> dict[str, Any]:
    """Return the rows of a micro-batch, where routers have a loss: it is one of each micro-batch.

    All other losses are means over a step's whole batch, however that is cut.
    """
    model = load_model_config(config.model).get_text_config()
    if not getattr(model, "output_router_logits", False):
        return {}
    return {"micro_batch_size": config.train.rows_of_a_pass(config.cluster.num_workers)}


def dense_model(context: StageContext) -> ModelConfig:
    """Return the model that the dense stage made, for one that starts from it or learns from it."""
    changes: dict[str, Any] = {
        "path": str(context.inputs[DENSE.name] / "model"),
        "revision": None,
        "gguf_file": None,
        "overrides": {},
        "random_init": False,
    }
    return context.config.model.model_copy(update=changes)


def starting_model(context: StageContext) -> ModelConfig:
    """Return the model that pruning starts from: the pretrained one, or what the dense stage made."""
    config = context.config
    return dense_model(context) if config.prune.start_from == "dense" else config.model


DENSE = DenseStage()
