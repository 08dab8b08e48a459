"""The model in DeepSpeed's hands: parameter groups, the optimizer and the engine."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from pydantic import Field

from mgpp import grouped_parameters
from pipeline.context import Context
from pipeline.errors import ConfigError
from pipeline.models.loading import load_model
from pipeline.models.passed_over import passed_over_problems
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import PruneSection
from pipeline.section import Section, Seed, Share
from pipeline.tasks import Task
from pipeline.training.batches import BatchPlan
from pipeline.training.deepspeed import (
    ZeroConfig,
    check_capabilities,
    deepspeed_config,
    widen_gradients,
)
from pipeline.worker_group import WorkerGroup


class OptimizerConfig(Section):
    """AdamW and what it trains."""

    lr: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate of AdamW."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """AdamW's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = None
    """Largest global norm of the loss gradient; the prior is added after it."""
    freeze: list[str] = []
    """Patterns of parameters that are not trained ("*.embeddings.*")."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    seed: Seed = 0
    """Of the new head, the order of rows and dropout."""


def make_engine(
    context: Context,
    model_config: ModelConfig,
    task: Task,
    config: OptimizerConfig,
    zero: ZeroConfig,
    prune: PruneSection | None,
    plan: BatchPlan,
) -> Any:
    """Load the model and hand it to DeepSpeed, with an optimizer whose first group is prunable.

    Args:
        context: the workers, all of which call this function, and what the data asks of the model.
        model_config: the pretrained model.
        task: what it is trained on.
        config: how.
        zero: how state is sharded.
        prune: what is pruned, or None.
        plan: how rows are split among workers.

    Returns:
        DeepSpeed's engine, in training mode.

    Raises:
        ConfigError: if the model cannot be loaded or trained so.
        StageError: if a node cannot do what is asked.
    """
    import deepspeed

    check_capabilities(zero)
    settings = deepspeed_config(
        zero,
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.accumulation,
        gradient_clipping=config.gradient_clipping,
        on_gpu=context.workers.device.type == "cuda",
    )
    model = load_model(
        model_config,
        task.auto_model,
        model_kwargs=context.model_kwargs,
        dtype=zero.dtype,
        seed=config.seed,
        zero3=settings if zero.stage == 3 else None,
        workers=context.workers,
        notify=_notes(context),
    )
    problems = passed_over_problems(model, zero.stage, context.workers.world_size)
    if problems:
        raise ConfigError(problems)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    freeze(model, config.freeze)
    prunable = prune.settings.select(model) if prune else []
    optimizer = torch.optim.AdamW(
        grouped_parameters(model, prunable, weight_decay=config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    widen_gradients(zero, engine.module)
    engine.train()
    return engine


def make_inference_model(
    config: ModelConfig, task: Task, zero: ZeroConfig, batch_size: int, workers: WorkerGroup
) -> Any:
    """Load a trained model that only runs forward: whole on each worker, or sharded under ZeRO 3.

    Args:
        config: the model, with its head.
        task: what it was trained on.
        zero: precision, and whether it is sharded.
        batch_size: rows a worker takes in one forward pass.
        workers: all of them; all call this function.

    Returns:
        The model, or under ZeRO 3 DeepSpeed's engine, in evaluation mode.
    """
    settings = None
    if zero.stage == 3:
        settings = deepspeed_config(
            zero.model_copy(update={"offload_optimizer": False}),
            micro_batch_size=batch_size,
            accumulation=1,
            gradient_clipping=None,
            on_gpu=workers.device.type == "cuda",
        )
    model = load_model(
        config,
        task.auto_model,
        model_kwargs={},
        dtype=zero.dtype,
        seed=0,
        zero3=settings,
        new_head=False,
        workers=workers,
    )
    for of_model in (model.config, model.config.get_text_config()):
        of_model.use_cache = False  # keys and values are kept only where texts are generated
    if settings is None:
        return model.to(workers.device).eval()
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


def _notes(context: Context) -> Callable[[str], None]:
    """Return what shows a note, once for all workers."""

    def notify(text: str) -> None:
        if context.workers.is_main:
            context.progress({"event": "note", "text": text})

    return notify


def freeze(model: torch.nn.Module, patterns: list[str]) -> None:
    """Exclude the parameters that match from training.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    for pattern in patterns:
        matching = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"pattern {pattern!r} matches no parameter")
        for parameter in matching:
            parameter.requires_grad_(False)
