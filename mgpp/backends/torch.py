"""Plain torch: every prunable weight is one whole shard, held by the parameter itself."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from mgpp.masking.allocation import Placement
from mgpp.methods.base import Method
from mgpp.pruner import Pruner, claim
from mgpp.schedule import PruningSchedule
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.shards import Shard


def attach(
    optimizer: Optimizer,
    prunable: Mapping[str, nn.Parameter],
    *,
    method: Method,
    schedule: PruningSchedule,
    placement: Placement | None = None,
    transposed: Collection[str] = (),
    keep_zeros: bool = False,
) -> Pruner:
    """Prune the given parameters whenever `optimizer` steps.

    Under data parallelism without sharding, call it on every rank: gradients are equal after their
    all-reduce, so the masks are; the ranks of the default process group check that they are.

    Args:
        optimizer: any torch optimizer over (at least) these parameters; its hooks are used.
        prunable: float32 parameters by name.
        method: what is added to plain magnitude pruning.
        schedule: when to prune and how far.
        placement: how sparsity is distributed; over all weights unless given.
        transposed: names of the weights stored inputs first (`Conv1D`), for patterns.
        keep_zeros: whether the weights that are zero now stay zero.

    Returns:
        The pruner, for its state and its figures.

    Raises:
        ValueError: if the parameters are pruned under this optimizer already.
    """
    shards = [
        Shard(
            name=name,
            index=index,
            full_shape=tuple(parameter.shape),
            offset=0,
            numel=parameter.numel(),
            flat=parameter,
            start=0,
        )
        for index, (name, parameter) in enumerate(prunable.items())
    ]
    shapes = {shard.name: shard.full_shape for shard in shards}
    replica_group = None
    if dist.is_available() and dist.is_initialized():
        device = torch.device("cpu") if dist.get_backend() == "gloo" else shards[0].flat.device
        replica_group = Collectives.over(device=device)
    first = shards[0].flat
    groups = (g for g in optimizer.param_groups if any(p is first for p in g["params"]))
    pruner = Pruner(
        shards,
        shapes,
        method=method,
        schedule=schedule,
        placement=placement,
        transposed=transposed,
        keep_zeros=keep_zeros,
        replica_group=replica_group,
        group=next(groups, None),
    )

    claim(optimizer, prunable.values(), pruner)

    def before(*_: Any) -> None:
        without = [p for p in prunable.values() if p.grad is None]
        if len(without) < len(prunable):  # otherwise backward was not run, which methods tell
            for parameter in without:  # it took no part in the loss of this step
                parameter.grad = torch.zeros_like(parameter)
        pruner.before_update(pruner.shards)

    def after(*_: Any) -> None:
        pruner.after_update(pruner.shards)
        pruner.finish_step()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return pruner
