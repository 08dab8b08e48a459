"""Pruning in your own training loop: parameter groups, and one call."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mgpp.backends import deepspeed, torch
from mgpp.config import PruningConfig, read_config
from mgpp.prunable import transposed_weights
from mgpp.pruner import Pruner


def attach(
    target: Any,
    config: PruningConfig | Mapping[str, Any],
    num_steps: int,
    num_examples: int,
) -> Pruner:
    """Prune from now on whenever the optimizer steps; call it on every rank.

    Args:
        target: a DeepSpeed engine, or the pair (model, optimizer): of plain torch, also under
            DistributedDataParallel, or what `accelerator.prepare` returned.
        config: a PruningConfig, or a mapping with its keys.
        num_steps: optimizer steps of the whole run.
        num_examples: training examples of the whole run, not tokens; the prior is weighted by its
            inverse.

    Returns:
        The pruner: its `state_dict` belongs in the checkpoint, its `sparsity` in the log.

    Raises:
        ValueError: for settings out of range, patterns that match nothing, weights that the optimizer
            does not hold, and layouts that cannot be pruned, with what to use.
        TypeError: if `target` is neither.
    """
    settings = read_config(config)
    method, schedule = settings.build_method(num_examples), settings.schedule(num_steps)
    placement = settings.placement()
    if _is_engine(target) or (isinstance(target, tuple) and _is_engine(target[0])):
        engine = target[0] if isinstance(target, tuple) else target
        prunable = _prunable(engine.module, settings)
        return deepspeed.attach(
            engine,
            prunable,
            method=method,
            schedule=schedule,
            placement=placement,
            transposed=transposed_weights(engine.module),
            keep_zeros=settings.keep_zeros,
        )
    if not isinstance(target, tuple) or len(target) != 2:
        raise TypeError(
            f"need a DeepSpeed engine or a pair (model, optimizer), got {type(target).__name__}"
        )
    model, optimizer = _unwrapped_model(target[0]), _unwrapped_optimizer(target[1])
    prunable = _prunable(model, settings)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in prunable.items():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{name} is sharded by torch (FSDP or tensor parallel); use DeepSpeed ZeRO"
            )
        if id(parameter) not in held:
            raise ValueError(
                f"{name} is not in the optimizer: give the optimizer that trains this model, and "
                "attach after both were prepared"
            )
    return torch.attach(
        optimizer,
        prunable,
        method=method,
        schedule=schedule,
        placement=placement,
        transposed=transposed_weights(model),
        keep_zeros=settings.keep_zeros,
    )


def parameter_groups(
    model: nn.Module,
    config: PruningConfig | Mapping[str, Any],
    *,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: prunable weights first, as DeepSpeed needs them.

    Args:
        model: before DeepSpeed has it.
        config: as for `attach`.
        weight_decay: of all matrices; vectors have none.
    """
    settings = read_config(config)
    names = settings.select(model)
    return grouped_parameters(model, names, weight_decay=weight_decay)


def grouped_parameters(
    model: nn.Module, prunable: Iterable[str], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the groups of trained parameters: prunable ones, other matrices, vectors without decay."""
    first = set(prunable)
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dims = len(getattr(parameter, "ds_shape", parameter.shape))
            groups[0 if name in first else 1 if dims > 1 else 2].append(parameter)
    decays = (weight_decay, weight_decay, 0.0)
    return [
        {"params": group, "weight_decay": decay}
        for group, decay in zip(groups, decays, strict=True)
        if group
    ]


def _prunable(model: nn.Module, config: PruningConfig) -> dict[str, nn.Parameter]:
    weights = dict(model.named_parameters())
    return {name: weights[name] for name in config.select(model)}


def _is_engine(target: Any) -> bool:
    """Tell a DeepSpeed engine by its face; importing DeepSpeed to ask would take seconds."""
    return hasattr(target, "zero_optimization_stage") and hasattr(target, "basic_optimizer")


def _unwrapped_model(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))  # torch.compile, DDP
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer that really steps: Accelerate's wrapper does not run hooks of its own."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"need a torch optimizer, got {type(optimizer).__name__}")
    return optimizer
