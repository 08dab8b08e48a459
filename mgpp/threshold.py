"""The exact k-th smallest magnitude over all shards, and exactly which k weights go.

For non-negative float32 the order of values is the order of their bit patterns. So the k-th smallest
|w| needs no gathering and no sorting: count magnitudes by the high 16 bits of their pattern, sum the
65,536 counts over the ranks, find the bin that holds k, count that bin by the low 16 bits, sum again.
Two passes over the weights and 1 MiB sent by a rank, whatever the model's size, and the same result
bit for bit on any number of ranks. Clearing the sign bit makes -0.0 equal 0.0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.collectives import Collectives
from mgpp.shards import Shard

_MAGNITUDE = 0x7FFFFFFF
_NUM_BINS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the k smallest magnitudes end.

    Attributes:
        k: how many weights go, over all ranks.
        bits: bit pattern of the k-th smallest magnitude; all patterns below it go.
        tied_quota: by position in this rank's list of shards, how many weights equal to the k-th
            magnitude go from it, first come first; None where all of them go, the usual case.
    """

    k: int
    bits: int
    tied_quota: tuple[int, ...] | None

    @property
    def threshold(self) -> float:
        """The k-th smallest magnitude (0 when k = 0)."""
        return float(torch.tensor(self.bits, dtype=torch.int32).view(torch.float32))


def magnitude_bits(weight: Tensor) -> Tensor:
    """Return the bit pattern of |w| as int32, ordered as the magnitudes are."""
    return weight.view(torch.int32) & _MAGNITUDE


def find_cut(shards: Sequence[Shard], k: int, num_weights: int, collectives: Collectives) -> Cut:
    """Find which k weights have the smallest magnitude over all shards of all ranks.

    Ties at the k-th value go in global order: by weight, then by position in it. That order does
    not depend on how the weights are sharded.

    Args:
        shards: this rank's shards.
        k: how many weights are to go, 0 <= k <= all prunable weights.
        num_weights: number of prunable weights (matrices) over the whole model.
        collectives: the group over which the weights are sharded.

    Raises:
        ValueError: if k is negative or exceeds the number of weights there are.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if k == 0:
        return Cut(k=0, bits=0, tied_quota=(0,) * len(shards))
    high, rest, _ = _bin_holding(k, _count(shards, collectives, high=None))
    low, num_tied, all_tied = _bin_holding(rest, _count(shards, collectives, high=high))
    bits = high << 16 | low
    if num_tied == all_tied:
        return Cut(k=k, bits=bits, tied_quota=None)
    quota = _share_ties(shards, bits, num_tied, num_weights, collectives)
    return Cut(k=k, bits=bits, tied_quota=quota)


def pruned_chunks(
    shards: Sequence[Shard], position: int, cut: Cut
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (chunk of a shard's weights, bool: goes), chunk by chunk.

    Args:
        shards: the list given to `find_cut`.
        position: which shard of it.
        cut: the result of `find_cut`.
    """
    quota = 0 if cut.tied_quota is None else cut.tied_quota[position]
    for chunk in shards[position].chunks():
        bits = magnitude_bits(chunk)
        goes = bits <= cut.bits if cut.tied_quota is None else bits < cut.bits
        if quota:
            tied = (bits == cut.bits).nonzero().squeeze(1)[:quota]
            goes[tied] = True
            quota -= tied.numel()
        yield chunk, goes
    assert quota == 0, "the weights changed between the count and the cut"


def _count(shards: Sequence[Shard], collectives: Collectives, high: int | None) -> Tensor:
    """Count this rank's magnitudes by 16 bits of their pattern, summed over the ranks.

    With `high` None by the upper 16 bits, else those whose upper bits are `high` by the lower 16.
    """
    counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=collectives.device)
    for shard in shards:
        for chunk in shard.chunks():
            bits = magnitude_bits(chunk)
            upper = bits >> 16
            bits = upper if high is None else bits[upper == high] & (_NUM_BINS - 1)
            counts += torch.bincount(bits, minlength=_NUM_BINS).to(counts.device)
    collectives.all_reduce(counts)
    return counts


def _bin_holding(k: int, counts: Tensor) -> tuple[int, int, int]:
    """Return the bin in which the k-th item lies, its 1-based place there, and the bin's size."""
    ends = counts.cumsum(0)
    if k > int(ends[-1]):
        raise ValueError(f"k = {k} exceeds the {int(ends[-1])} weights there are")
    index = int(torch.searchsorted(ends, k))
    size = int(counts[index])
    return index, k - (int(ends[index]) - size), size


def _share_ties(
    shards: Sequence[Shard],
    bits: int,
    num_tied: int,
    num_weights: int,
    collectives: Collectives,
) -> tuple[int, ...]:
    """Divide the `num_tied` ties that go among the shards, in global order."""
    local = [
        sum(int((magnitude_bits(c) == bits).sum()) for c in shard.chunks()) for shard in shards
    ]
    by_weight = [0] * num_weights
    for shard, count in zip(shards, local, strict=True):
        by_weight[shard.index] += count
    totals = collectives.sum(by_weight)
    left, straddled, quotas = num_tied, -1, [0] * num_weights
    for index, total in enumerate(totals):
        quotas[index] = min(left, total)
        left -= quotas[index]
        if 0 < quotas[index] < total:
            straddled = index
    # Only one weight can be cut in two; there the ranks before this one take theirs first.
    mine = by_weight[straddled] if straddled >= 0 else 0
    before = sum(collectives.by_rank(mine)[: collectives.rank])
    result = []
    for shard, count in zip(shards, local, strict=True):
        quota = quotas[shard.index]
        if shard.index == straddled:
            quota -= before
        result.append(min(max(quota, 0), count))
    return tuple(result)
