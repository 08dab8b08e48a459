"""Exactly which weights are pruned: cuts at the k-th smallest magnitude over all shards, ties included.

One cut over all weights sends some 110 KiB, whatever the model's size; many are found together, each
then sends some 16 KiB, and so many at a time that 16 MiB are sent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.sharding.collectives import Collectives
from mgpp.sharding.counting import count_around, magnitude_of, nth_equal
from mgpp.sharding.kth_smallest import Asked, Kth, kth_smallest
from mgpp.sharding.kth_smallest import sent_bytes as counted_bytes
from mgpp.sharding.masks import keep_above
from mgpp.sharding.stacks import Stacks

_MOST_SENT = 16 << 20
_ALL = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights (matrices) that are cut at one threshold.

    Attributes:
        indices: their numbers among all prunable matrices, rising.
        k: how many of their elements are pruned, over all ranks.
    """

    indices: tuple[int, ...]
    k: int


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the k smallest magnitudes of a group end.

    Attributes:
        k: how many weights are pruned, over all ranks.
        bits: bit pattern of the k-th smallest magnitude; all below it are pruned.
        tied_quota: by matrix, how many of this rank's elements equal to the k-th magnitude are pruned,
            first come first, none unless given; None where all are, the usual case.
    """

    k: int
    bits: int
    tied_quota: Mapping[int, int] | None

    @property
    def threshold(self) -> float:
        """The k-th smallest magnitude (0 when k = 0)."""
        return magnitude_of(self.bits)


def find_cuts(
    stacks: Stacks, groups: Sequence[Group], full_numels: Sequence[int], collectives: Collectives
) -> list[Cut]:
    """Find for each group which k of its elements have the smallest magnitude over all ranks.

    Ties at the k-th value are pruned in global order: by matrix, then by position in it. That order does
    not depend on how the weights are sharded.

    Args:
        stacks: this rank's values; matrices in no group are passed over.
        groups: the same on all ranks; no matrix is in two.
        full_numels: elements of each whole matrix, by its number.
        collectives: the group over which the weights are sharded.

    Raises:
        ValueError: if a k is negative or exceeds the number of elements there are.
    """
    totals = [sum(full_numels[index] for index in group.indices) for group in groups]
    for group, total in zip(groups, totals, strict=True):
        if group.k < 0:
            raise ValueError(f"k must not be negative, got {group.k}")
        if group.k > total:
            raise ValueError(f"k = {group.k} exceeds the {total} weights there are")
    cuts = [Cut(k=0, bits=0, tied_quota={})] * len(groups)
    busy = [i for i, group in enumerate(groups) if group.k]
    for batch in _batches(busy):
        asked = [Asked(indices=groups[i].indices, k=groups[i].k, total=totals[i]) for i in batch]
        held = stacks.holding({index for group in asked for index in group.indices})
        found, with_equal = kth_smallest(held, asked, collectives)
        quotas = _tied_quotas(with_equal, asked, found, collectives)
        for i, kth, quota in zip(batch, found, quotas, strict=True):
            cuts[i] = Cut(k=groups[i].k, bits=kth.bits, tied_quota=quota)
    return cuts


def sent_bytes(world_size: int, num_matrices: int, num_groups: int = 1) -> int:
    """Return the most that a rank hands to reductions for one `find_cuts`, in bytes.

    Args:
        world_size: ranks over which the weights are sharded.
        num_matrices: number of prunable matrices over the whole model.
        num_groups: how many cuts are found.
    """
    counted = sum(counted_bytes(len(batch)) for batch in _batches(range(num_groups)))
    return counted + 8 * (num_matrices + num_groups * world_size)


def packed_masks(stacks: Stacks, cuts: Mapping[int, Cut]) -> list[Tensor]:
    """Return the packed masks of this rank's values.

    Args:
        stacks: those given to `find_cuts`.
        cuts: by matrix.
    """
    if not stacks.values:
        return []
    by_matrix = [cuts[number] for number in range(stacks.num_matrices)]
    bits = stacks.of_matrices([cut.bits for cut in by_matrix], torch.int32)
    until = stacks.of_matrices([0 if cut.tied_quota is not None else _ALL for cut in by_matrix])
    nth = [(cut.tied_quota or {}).get(number, 0) for number, cut in enumerate(by_matrix)]
    if any(nth):
        until += nth_equal(stacks.values, stacks.places, bits, stacks.of_matrices(nth))
    return keep_above(stacks.values, stacks.places, bits, until)


def _batches(groups: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield groups, so many at a time that no more is sent than `_MOST_SENT`."""
    size = max(_MOST_SENT // (counted_bytes(1 << 10) >> 10), 1)
    return (groups[i : i + size] for i in range(0, len(groups), size))


def _tied_quotas(
    stacks: Stacks, asked: Sequence[Asked], found: Sequence[Kth], collectives: Collectives
) -> list[Mapping[int, int] | None]:
    """Return each cut's `tied_quota`: ties to prune are divided among the ranks in global order.

    Args:
        stacks: this rank's values, or some that have all that are equal to the cut of their group.
        asked: the groups.
        found: the k-th of each.
        collectives: the group over which the weights are sharded.
    """
    tied = [i for i, kth in enumerate(found) if kth.place < kth.num_equal]
    quotas: list[Mapping[int, int] | None] = [None] * len(asked)
    if not tied:
        return quotas
    bits = [0] * stacks.num_matrices
    for i in tied:
        for index in asked[i].indices:
            bits[index] = found[i].bits
    around = [0] * stacks.num_matrices
    if stacks.values:
        cuts = stacks.of_matrices(bits, torch.int32)
        around = count_around(stacks.values, stacks.places, cuts)[1].tolist()
    indices = [index for i in tied for index in asked[i].indices]
    totals = dict(zip(indices, collectives.sum([around[index] for index in indices]), strict=True))
    shares, straddled = {}, []
    for i in tied:
        left = found[i].place
        for index in asked[i].indices:
            shares[index] = min(left, totals[index])
            left -= shares[index]
            if 0 < shares[index] < totals[index]:
                straddled.append(index)
    # Only one matrix of a group can be cut in two; there the ranks before this one take theirs first.
    held = collectives.by_rank_all([around[index] for index in straddled])
    for index, counts in zip(straddled, held, strict=True):
        shares[index] -= sum(counts[: collectives.rank])
    for i in tied:
        mine = {n: min(max(shares[n], 0), around[n]) for n in asked[i].indices}
        quotas[i] = {number: share for number, share in mine.items() if share}
    return quotas
