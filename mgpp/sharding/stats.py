"""Counts over this rank's shards; sums over ranks are the caller's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mgpp.sharding.bitmask import all_kept, count_true
from mgpp.sharding.shards import CHUNK, Shard

# The multipliers of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
# generators", 2014), as signed 64-bit integers.
_MIX = (-0x61C8864680B583EB, -0x4B47D0C1A1E98BB9)


def num_zeros(shards: Sequence[Shard]) -> int:
    """Count weights equal to zero."""
    return sum(count_true(chunk == 0) for s in shards for chunk in s.chunks())


def num_below(shards: Sequence[Shard], magnitude: float) -> int:
    """Count weights whose magnitude is below `magnitude`."""
    return sum(count_true(c.abs() < magnitude) for s in shards for c in s.chunks())


def num_not_finite(shards: Sequence[Shard]) -> int:
    """Count weights that are infinite or no number."""
    return sum(count_true(~chunk.isfinite()) for s in shards for chunk in s.chunks())


def positions_hash(keep: Tensor, numel: int, first: int) -> int:
    """Hash which of `numel` weights are pruned, the first at global position `first`.

    The bits are taken as bytes of the whole model's mask, each with a random 64-bit factor, and summed
    modulo 2^64: linear in every bit, so the hashes of parts add up to that of the whole however it
    was cut, also in the middle of a byte.
    """
    shift, total = first % 8, 0
    for i, bits in enumerate(keep.split(CHUNK // 8)):
        size = min(CHUNK, numel - i * CHUNK)
        pruned = (bits ^ all_kept(size, keep.device)).to(torch.int64) << shift
        begin = first // 8 + i * CHUNK // 8
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
