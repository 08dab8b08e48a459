"""Pruning in a training loop of one's own: settings, parameter groups, and one call."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mgpp.backends import deepspeed, torch
from mgpp.masking.allocation import Placement
from mgpp.methods import Method, make_method
from mgpp.prunable import select_prunable, transposed_weights
from mgpp.pruner import Pruner
from mgpp.schedule import PruningSchedule

_SCHEDULE_KEYS = ("sparsity", "initial_sparsity", "warmup", "finetune", "interval")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """What is pruned, how far and when.

    Attributes:
        sparsity: final share of the prunable weights set to zero, in [0, 1). "sparse-transfer" has none
            and no schedule: what is zero as it is attached stays zero.
        initial_sparsity: share set to zero at the first pruning.
        warmup: training before the first pruning: steps (an int) or a share of all (a float below 1).
        finetune: training after the last pruning with the mask fixed, likewise.
        interval: steps between two prunings.
        method: its name ("mgpp", ...), or a mapping with `name` and its settings.
        include: patterns of prunable weights; all matrices of the repeated layers unless given.
        exclude: patterns of weights to leave alone.
        scope: what competes: "global", all weights; "layer", those of one numbered layer; "uniform",
            those of one matrix; "lamp", all weights by the layer-adaptive score of arXiv 2010.07611.
        budgets: final sparsity by pattern; what remains of `sparsity` goes to the other weights.
        min_kept: share of every matrix that stays, at least.
        pattern: "N:M" ("2:4": 2 of every 4 inputs stay) or "ROWSxCOLUMNS" ("32x1": whole blocks go).

    Raises:
        ValueError: if a number is out of range or the method is not known.
    """

    sparsity: float | None = None
    initial_sparsity: float = 0.0
    warmup: int | float = 0.1
    finetune: int | float = 0.1
    interval: int = 10
    method: str | Mapping[str, Any] = "mgpp"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scope: str = "global"
    budgets: Mapping[str, float] = field(default_factory=dict)
    min_kept: float = 0.0
    pattern: str | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "finetune"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise ValueError(f"{name}: got {value!r}; give steps (an int) or a share below 1")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: got a string; give a list of patterns")
        if self.build_method(num_examples=1).keeps_zeros:
            self._refuse_schedule()
        elif self.sparsity is None:
            raise ValueError("sparsity: missing")
        self.placement()

    def placement(self) -> Placement:
        """Return where sparsity goes."""
        return Placement(
            scope=self.scope, budgets=self.budgets, min_kept=self.min_kept, pattern=self.pattern
        )

    def _refuse_schedule(self) -> None:
        for entry in fields(self):
            if entry.name in _SCHEDULE_KEYS and getattr(self, entry.name) != entry.default:
                raise ValueError(
                    f"{entry.name}: got {getattr(self, entry.name)!r}; this method keeps the zeros it "
                    f"finds and takes none of {', '.join(_SCHEDULE_KEYS)}"
                )

    def build_method(self, num_examples: int) -> Method:
        """Return the method for a number of training examples."""
        return make_method(self.method, num_examples=num_examples)

    def schedule(self, num_steps: int) -> PruningSchedule:
        """Return the schedule of a run of `num_steps` optimizer steps.

        Raises:
            ValueError: if prune_start is not before prune_end.
        """
        if self.sparsity is None:
            return PruningSchedule.fixed_mask(num_steps)
        warmup, finetune = (
            round(value * num_steps) if isinstance(value, float) else value
            for value in (self.warmup, self.finetune)
        )
        return PruningSchedule(
            num_steps=num_steps,
            warmup_steps=warmup,
            finetune_steps=finetune,
            interval=self.interval,
            initial_sparsity=self.initial_sparsity,
            final_sparsity=self.sparsity,
        )


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
    settings = _config(config)
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
    settings = _config(config)
    names = select_prunable(model, settings.include, settings.exclude)
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


def _config(config: PruningConfig | Mapping[str, Any]) -> PruningConfig:
    if isinstance(config, PruningConfig):
        return config
    allowed = [entry.name for entry in fields(PruningConfig)]
    unknown = sorted(set(config) - set(allowed))
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown key; allowed are {', '.join(allowed)}")
    return PruningConfig(**config)


def _prunable(model: nn.Module, config: PruningConfig) -> dict[str, nn.Parameter]:
    weights = dict(model.named_parameters())
    return {name: weights[name] for name in select_prunable(model, config.include, config.exclude)}


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
