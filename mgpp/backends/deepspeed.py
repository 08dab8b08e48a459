"""DeepSpeed ZeRO 0-3: where this rank's float32 shards lie, and hooks on the client optimizer.

The optimizer handed to `deepspeed.initialize` is, at its `step`, given exactly this rank's float32
partition and its gradient: reduced, averaged, accumulated, unscaled and clipped. So two hooks on it,
with the prunable weights in a parameter group of their own, see all that pruning needs, and what the
second one writes is copied to the low-precision weights by ZeRO itself.

    stage             inner steps         the shards are ranges of
    0                 1                   the parameters, or their float32 copies (replicated)
    1, 2              1 a group           one flat partition a group
    1, bf16 + fp32    1                   the same (BF16_Optimizer)
    3                 1 a sub-group       one flat partition a sub-group

This is the one file that knows DeepSpeed's insides; it was written against 0.19.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgpp.collectives import Collectives
from mgpp.methods.base import Method
from mgpp.pruner import Pruner
from mgpp.schedule import PruningSchedule
from mgpp.shards import Shard


@dataclass(frozen=True)
class _Layout:
    """This rank's shards by the flat tensor they are ranges of, in the order of the updates."""

    flats: list[Tensor]
    shards: list[list[Shard]]
    replicated: bool


def attach(
    engine: Any,
    prunable: Mapping[str, nn.Parameter],
    *,
    method: Method,
    schedule: PruningSchedule,
) -> Pruner:
    """Prune under a DeepSpeed engine, sharded as its ZeRO stage shards.

    Call it after `deepspeed.initialize`, on every rank. The optimizer given to `initialize` must be a
    client optimizer whose FIRST parameter group holds the prunable weights and nothing else.

    Args:
        engine: what `deepspeed.initialize` returned.
        prunable: the model's prunable parameters by name, in the model's order.
        method: what is added to plain magnitude pruning.
        schedule: when to prune and how far; its steps count updates really made, not those DeepSpeed
            skips on overflow.

    Returns:
        The pruner, for its state and its figures.

    Raises:
        ValueError: for a mode in which DeepSpeed is wrong or cannot be hooked, with what to use.
        RuntimeError: if the layout is not the one this file knows.
    """
    _refuse_unsupported(engine)
    group = engine.basic_optimizer.param_groups[0]
    layout = _layout(engine, group, prunable)
    witnesses = Collectives.over(_dp_group(engine), _collective_device(engine))
    collectives = Collectives() if layout.replicated else witnesses
    shards = sorted((s for unit in layout.shards for s in unit), key=lambda shard: shard.index)
    shapes = {name: _full_shape(parameter) for name, parameter in prunable.items()}
    pruner = Pruner(
        shards,
        shapes,
        method=method,
        schedule=schedule,
        collectives=collectives,
        witnesses=witnesses,
    )
    _hook(engine, group, layout, pruner)
    return pruner


def _hook(engine: Any, group: dict[str, Any], layout: _Layout, pruner: Pruner) -> None:
    unit_of = {id(flat): i for i, flat in enumerate(layout.flats)}
    updated: set[int] = set()

    def units(optimizer: Any) -> list[int]:
        # ZeRO 1/2 show the inner optimizer one group at a time; ZeRO 3 shows all, but only the
        # sub-group in turn has parameters. The dict object is the same throughout.
        if not any(shown is group for shown in optimizer.param_groups):
            return []
        flats = group["params"]
        return sorted({unit_of[id(flat)] for flat in flats})

    def before(optimizer: Any, *_: Any) -> None:
        for unit in units(optimizer):
            pruner.before_update(layout.shards[unit])

    def after(optimizer: Any, *_: Any) -> None:
        stepped = units(optimizer)
        for unit in stepped:
            pruner.after_update(layout.shards[unit])
        updated.update(stepped)
        if stepped and len(updated) == len(layout.flats):
            updated.clear()
            if pruner.finish_step() is not None and engine.zero_optimization_stage() == 3:
                _copy_earlier_sub_groups(engine, last=len(layout.flats) - 1)

    engine.basic_optimizer.register_step_pre_hook(before)
    engine.basic_optimizer.register_step_post_hook(after)


def _copy_earlier_sub_groups(engine: Any, last: int) -> None:
    """Copy what a pruning zeroed in sub-groups whose low-precision copy was already made.

    Only ZeRO 3 with several prunable sub-groups has any: each is copied right after its own update,
    before the last one is updated and the global threshold can be known. The copy of the last one,
    and the gathering of persistent parameters, follow in ZeRO's own step.
    """
    for sub_group in range(last):
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


def _layout(engine: Any, group: dict[str, Any], prunable: Mapping[str, nn.Parameter]) -> _Layout:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _replicated(group, prunable)
    optimizer = engine.optimizer
    if stage == 3:
        ours = [i for i, group_id in optimizer.sub_group_to_group_id.items() if group_id == 0]
        _check_group([p for i in ours for p in optimizer.fp16_groups[i]], prunable)
        placed = _zero3_shards(engine, prunable)
        flats = [optimizer.fp32_partitioned_groups_flat[i] for i in ours]
    else:  # ZeRO 1/2 and BF16_Optimizer call their groups differently
        low = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
        _check_group(low[0], prunable)
        placed = _flat_shards(group, prunable)
        flats = list(group["params"])
    by_flat: dict[int, list[Shard]] = {id(flat): [] for flat in flats}
    for shard in placed:
        if id(shard.flat) not in by_flat:
            raise RuntimeError(f"{shard.name} is not in the optimizer's first parameter group")
        by_flat[id(shard.flat)].append(shard)
    for flat in flats:
        _zero_padding(flat, by_flat[id(flat)])
    return _Layout(flats, [by_flat[id(flat)] for flat in flats], replicated=False)


def _check_group(parameters: Sequence[Any], prunable: Mapping[str, nn.Parameter]) -> None:
    """Make sure that the first group holds what is pruned and nothing else, which would be zeroed.

    Raises:
        ValueError: naming a weight that is missing, or how many are too many.
    """
    found = {id(parameter) for parameter in parameters}
    missing = [name for name, parameter in prunable.items() if id(parameter) not in found]
    extra = len(found) - (len(prunable) - len(missing))
    if missing or extra:
        problem = f"{missing[0]} is not in it" if missing else f"it holds {extra} others too"
        raise _wrong_group(problem)


def _wrong_group(problem: str) -> ValueError:
    return ValueError(
        "the first parameter group of the optimizer given to deepspeed.initialize must hold the "
        f"prunable weights and nothing else, but {problem}: make its groups with "
        "mgpp.parameter_groups(model, config)"
    )


def _replicated(group: dict[str, Any], prunable: Mapping[str, nn.Parameter]) -> _Layout:
    """Stage 0: the group's tensors are the weights, or their float32 copies, in the same order."""
    flats = list(group["params"])
    shapes = [tuple(flat.shape) for flat in flats]
    if shapes != [tuple(parameter.shape) for parameter in prunable.values()]:
        raise _wrong_group("its shapes are others")
    shards = [
        [_shard(name, index, tuple(flat.shape), 0, flat.numel(), flat, 0)]
        for index, (name, flat) in enumerate(zip(prunable, flats, strict=True))
    ]
    return _Layout(flats, shards, replicated=True)


def _flat_shards(group: dict[str, Any], prunable: Mapping[str, nn.Parameter]) -> list[Shard]:
    """ZeRO 1/2 and BF16_Optimizer: fragment addresses of the flat partition."""
    (flat,) = group["params"]
    shards = []
    for index, (name, parameter) in enumerate(prunable.items()):
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed
        if mapping is None:
            continue  # no part of this weight is on this rank
        shards.append(
            _shard(
                name,
                index,
                tuple(parameter.shape),
                mapping.lp_fragment_address.start,
                mapping.hp_fragment_address.numel,
                flat,
                mapping.hp_fragment_address.start,
            )
        )
    return shards


def _zero3_shards(engine: Any, prunable: Mapping[str, nn.Parameter]) -> list[Shard]:
    """ZeRO 3: every weight is cut evenly over the ranks; the last pieces may be padded or empty."""
    optimizer = engine.optimizer
    rank = dist.get_rank(_dp_group(engine))
    shards = []
    for index, (name, parameter) in enumerate(prunable.items()):
        sub_group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        full_numel = int(parameter.ds_numel)  # type: ignore[attr-defined]
        valid = min(max(full_numel - rank * size, 0), size)
        flat = optimizer.fp32_partitioned_groups_flat[sub_group]
        offset = min(rank * size, full_numel)
        shards.append(_shard(name, index, _full_shape(parameter), offset, valid, flat, start))
    return shards


def _shard(
    name: str,
    index: int,
    full_shape: tuple[int, ...],
    offset: int,
    numel: int,
    flat: Tensor,
    start: int,
) -> Shard:
    return Shard(
        name=name,
        index=index,
        full_shape=full_shape,
        offset=offset,
        numel=numel,
        flat=flat,
        start=start,
    )


def _zero_padding(flat: Tensor, shards: Sequence[Shard]) -> None:
    """Zero what of a flat partition is no weight.

    Under ZeRO 3 it is uninitialised memory (NaN and 1e34 were seen) that would reach norms.
    """
    padding = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    for shard in shards:
        padding[shard.start : shard.start + shard.numel] = False
    flat.detach().view(-1).masked_fill_(padding, 0.0)


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's whole shape; under ZeRO 3 the parameter itself is emptied."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _dp_group(engine: Any) -> Any:
    """The group over which ZeRO shards; stage 0 has no optimizer of its own and shards over none."""
    return getattr(engine.optimizer, "dp_process_group", None) or engine.data_parallel_group


def _collective_device(engine: Any) -> torch.device:
    """Where counts must live to be reduced: NCCL takes only device tensors."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else engine.device)


def _refuse_unsupported(engine: Any) -> None:
    zero = engine._config.zero_config
    stage = engine.zero_optimization_stage()
    offload = zero.offload_optimizer
    problems = [
        (
            stage == 0 and engine.fp16_enabled(),
            "fp16 at ZeRO stage 0: DeepSpeed never scales the loss but divides the gradients by the "
            "scale; use ZeRO stage 1, or bf16",
        ),
        (
            zero.round_robin_gradients,
            "zero_optimization.round_robin_gradients: it reorders the flat partitions; turn it off",
        ),
        (
            offload is not None and offload.ratio < 1,
            "zero_optimization.offload_optimizer.ratio below 1: the part kept on the device is "
            "updated by a second optimizer without our hooks; set ratio to 1",
        ),
        (
            getattr(zero, "zenflow", None) is not None,
            "ZenFlow: its asynchronous updates pass by the optimizer's hooks; turn it off",
        ),
        (
            offload is not None and getattr(offload, "super_offload", False),
            "SuperOffload: its updates run in another process; turn it off",
        ),
        (
            offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme",
            "optimizer offload to NVMe: the master weights are not in memory at the threshold; use "
            "CPU offload",
        ),
    ]
    for wrong, reason in problems:
        if wrong:
            raise ValueError(f"cannot prune under this DeepSpeed configuration: {reason}")
