"""Pruning by two hooks on the optimizer that DeepSpeed steps."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from mgpp.backends.deepspeed.layout import (
    Layout,
    collective_device,
    dp_group,
    full_shape,
    layout_of,
)
from mgpp.backends.deepspeed.refusals import refuse_unsupported
from mgpp.masking.allocation import Placement
from mgpp.methods.base import Method
from mgpp.pruner import Pruner, claim
from mgpp.schedule import PruningSchedule
from mgpp.sharding.collectives import Collectives


def attach(
    engine: Any,
    prunable: Mapping[str, nn.Parameter],
    *,
    method: Method,
    schedule: PruningSchedule,
    placement: Placement | None = None,
    transposed: Collection[str] = (),
    keep_zeros: bool = False,
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
        placement: how sparsity is distributed; over all weights unless given.
        transposed: names of the weights stored inputs first (`Conv1D`), for patterns.
        keep_zeros: whether the weights that are zero now stay zero.

    Returns:
        The pruner, for its state and its figures.

    Raises:
        ValueError: for a mode in which DeepSpeed is wrong or cannot be hooked, with what to use.
        RuntimeError: if the layout is not the one this file knows.
    """
    refuse_unsupported(engine)
    group = engine.basic_optimizer.param_groups[0]
    layout = layout_of(engine, group, prunable)
    replica_group = Collectives.over(dp_group(engine), collective_device(engine))
    collectives = Collectives() if layout.replicated else replica_group
    shards = sorted((s for unit in layout.shards for s in unit), key=lambda shard: shard.index)
    shapes = {name: full_shape(parameter) for name, parameter in prunable.items()}
    pruner = Pruner(
        shards,
        shapes,
        method=method,
        schedule=schedule,
        placement=placement,
        transposed=transposed,
        keep_zeros=keep_zeros,
        collectives=collectives,
        replica_group=replica_group,
        group=group,
    )
    claim(engine.basic_optimizer, prunable.values(), pruner)
    _hook(engine, group, layout, pruner)
    return pruner


def _hook(engine: Any, group: dict[str, Any], layout: Layout, pruner: Pruner) -> None:
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
