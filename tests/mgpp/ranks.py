"""Shards of in-memory weights for several ranks run as threads, with a real summing all-reduce."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mgpp import Collectives, Shard
from mgpp.sharding.stacks import Stacks

T = TypeVar("T")


def run_ranks(world_size: int, work: Callable[[Collectives], T]) -> list[T]:
    """Run `work` once a rank, in threads, and return the results in rank order."""
    barrier = threading.Barrier(world_size, timeout=30)
    posted: list[Tensor | None] = [None] * world_size
    results: list[T | None] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def all_reduce(tensor: Tensor) -> None:
            posted[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack([p for p in posted if p is not None]).sum(dim=0)
            barrier.wait()
            tensor.copy_(total)

        try:
            results[rank] = work(Collectives(rank, world_size, all_reduce))
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results  # type: ignore[return-value]


def contiguous_shards(weights: list[Tensor], rank: int, world_size: int) -> list[Shard]:
    """Cut the concatenation of all weights into equal ranges, as ZeRO 1 and 2 do."""
    flat = torch.cat([w.reshape(-1) for w in weights])
    size = -(-flat.numel() // world_size)
    begin, end = rank * size, min((rank + 1) * size, flat.numel())
    mine = flat[begin:end].clone()
    shards, at = [], 0
    for index, weight in enumerate(weights):
        first, last = max(at, begin), min(at + weight.numel(), end)
        if first < last:
            shards.append(_shard(index, weight, first - at, last - first, mine, first - begin))
        at += weight.numel()
    return shards


def per_weight_shards(weights: list[Tensor], rank: int, world_size: int) -> list[Shard]:
    """Cut every weight into equal ranges, as ZeRO 3 does; the last ones may be short or empty."""
    shards = []
    for index, weight in enumerate(weights):
        size = -(-weight.numel() // world_size)
        begin = min(rank * size, weight.numel())
        end = min(begin + size, weight.numel())
        mine = weight.reshape(-1)[begin:end].clone()
        shards.append(_shard(index, weight, begin, end - begin, mine, 0))
    return shards


def odd_shards(weights: list[Tensor], rank: int, world_size: int) -> list[Shard]:
    """Cut every weight anywhere, as no framework does; pieces may be empty."""
    shards = []
    for index, weight in enumerate(weights):
        numel = weight.numel()
        generator = torch.Generator().manual_seed(numel + 7 * index)
        cuts = torch.randint(numel + 1, (world_size - 1,), generator=generator).tolist()
        begin, end = sorted([0, *cuts, numel])[rank : rank + 2]
        mine = weight.reshape(-1)[begin:end].clone()
        shards.append(_shard(index, weight, begin, end - begin, mine, 0))
    return shards


def stacks_of(shards: list[Shard], num_matrices: int) -> Stacks:
    """Return shards of matrices as what is counted and cut."""
    return Stacks(
        values=[shard.weight for shard in shards],
        places=[n for s in shards for n in (s.index, s.offset, s.full_numel)],
        num_matrices=num_matrices,
        device=torch.device("cpu"),
    )


def _shard(index: int, weight: Tensor, offset: int, numel: int, flat: Tensor, start: int) -> Shard:
    return Shard(
        name=f"layers.{index}.weight",
        index=index,
        full_shape=tuple(weight.shape),
        offset=offset,
        numel=numel,
        flat=flat,
        start=start,
    )
