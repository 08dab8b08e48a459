"""Counts over this rank's shards; sums over ranks are the caller's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mgpp.kernels.devices import bit_chunks, chunk_size, moved
from mgpp.sharding.bitmask import all_kept
from mgpp.sharding.counting import count_around, pattern_of
from mgpp.sharding.shards import Shard

# The multipliers of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
# generators", 2014), as signed 64-bit integers.
_MIX = (-0x61C8864680B583EB, -0x4B47D0C1A1E98BB9)


def counts_around(shards: Sequence[Shard], magnitude: float) -> Tensor:
    """Count the weights whose magnitude is below one, and those that have it: int64 [2]."""
    cuts = torch.tensor([pattern_of(magnitude)], dtype=torch.int32)
    if not shards:
        return torch.zeros(2, dtype=torch.int64)
    whole = [number for shard in shards for number in (0, 0, max(shard.numel, 1))]
    cuts = moved(cuts, shards[0].flat.device)
    return count_around([shard.weight for shard in shards], whole, cuts).view(2)


def num_not_finite(shards: Sequence[Shard]) -> int:
    """Count weights that are infinite or no number."""
    finite = int(counts_around(shards, float("inf"))[0])
    return sum(shard.numel for shard in shards) - finite


def positions_hash(keep: Tensor, numel: int, first: int) -> int:
    """Hash which of `numel` weights are pruned, the first at global position `first`.

    The bits are taken as bytes of the whole model's mask, each with a random 64-bit factor, and summed
    modulo 2^64: linear in every bit, so the hashes of parts add up to that of the whole however it
    was cut, also in the middle of a byte.
    """
    shift, total, chunk = first % 8, 0, chunk_size(keep.device)
    for i, bits in enumerate(bit_chunks(keep)):
        size = min(chunk, numel - i * chunk)
        pruned = (bits ^ all_kept(size, keep.device)).to(torch.int64) << shift
        begin = (first + i * chunk) // 8
        factors = _mixed(torch.arange(begin, begin + bits.numel() + 1, device=keep.device))
        low, high = pruned & 0xFF, pruned >> 8
        total += int((low * factors[:-1]).sum()) + int((high * factors[1:]).sum())
    return wrap_int64(total)


def _mixed(numbers: Tensor) -> Tensor:
    """Turn int64 numbers into random-looking odd ones."""
    mixed = (numbers + 1) * _MIX[0]
    mixed ^= mixed >> 31
    mixed *= _MIX[1]
    mixed ^= mixed >> 29
    return mixed | 1


def wrap_int64(value: int) -> int:
    """Reduce a Python integer to the signed 64-bit value congruent to it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
