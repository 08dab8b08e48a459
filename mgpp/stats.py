"""Counts over this rank's shards; sums over ranks are the caller's."""

from collections.abc import Sequence

from torch import Tensor

from mgpp.mask import unpack_bits
from mgpp.shards import CHUNK, Shard

# The multipliers of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
# generators", 2014), as signed 64-bit integers.
_MIX = (-0x61C8864680B583EB, -0x4B47D0C1A1E98BB9)


def num_zeros(shards: Sequence[Shard]) -> int:
    """Count weights equal to zero."""
    return sum(int((chunk == 0).sum()) for s in shards for chunk in s.chunks())


def num_below(shards: Sequence[Shard], magnitude: float) -> int:
    """Count weights whose magnitude is below `magnitude`."""
    return sum(int((c.abs() < magnitude).sum()) for s in shards for c in s.chunks())


def positions_hash(keep: Tensor, numel: int, first: int) -> int:
    """Hash which of `numel` weights are pruned, the first at global position `first`.

    The hash is the sum modulo 2^64 of a mixed value of each pruned position, so hashes of pieces
    add up to the hash of the whole however it was cut.
    """
    total = 0
    for i, bits in enumerate(keep.split(CHUNK // 8)):
        size = min(CHUNK, numel - i * CHUNK)
        pruned = (~unpack_bits(bits, size)).nonzero().squeeze(1)
        mixed = pruned.add_(first + i * CHUNK + 1).mul_(_MIX[0])
        mixed ^= mixed >> 31
        mixed.mul_(_MIX[1])
        mixed ^= mixed >> 29
        total = wrap_int64(total + int(mixed.sum()))
    return total


def wrap_int64(value: int) -> int:
    """Reduce a Python integer to the signed 64-bit value congruent to it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
