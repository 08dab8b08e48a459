"""The weights that a model computes with, as ZeRO 3 cuts them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


def shard_numel(parameter: Any) -> int:
    """Return how many elements a rank holds of a parameter of ZeRO 3, the last ones fewer or none."""
    if _is_plain(parameter):
        return int(parameter.ds_tensor.ds_numel)
    return -(-int(parameter.ds_numel) // dist.get_world_size())


@contextmanager
def local_shards(parameters: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Give this rank's part of each parameter of ZeRO 3, 1-D; all ranks must call.

    Rank r's part begins at element r * `shard_numel`. What does not lie in memory in that cut (on NVMe,
    in 8 bits, sharded over some of the ranks) is gathered for as long as the block runs.
    """
    import deepspeed

    rank = dist.get_rank()
    others = [p for p in parameters if not _is_plain(p)]
    with deepspeed.zero.GatheredParameters(others, enabled=bool(others)):
        shards = []
        for parameter in parameters:
            size = shard_numel(parameter)
            begin = min(rank * size, parameter.ds_numel)
            numel = min(size, parameter.ds_numel - begin)
            if _is_plain(parameter):
                shards.append(parameter.ds_tensor.detach().view(-1)[:numel])
            else:
                shards.append(parameter.detach().reshape(-1)[begin : begin + numel])
        yield shards


def _is_plain(parameter: Any) -> bool:
    """Return whether a parameter is cut evenly over all ranks, and its parts lie in memory."""
    shard = parameter.ds_tensor
    over_all = dist.get_world_size(parameter.ds_process_group) == dist.get_world_size()
    return over_all and shard.status.name == "AVAILABLE" and not hasattr(shard, "ds_quant_scale")
