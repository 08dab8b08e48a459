"""Exactly which weights are pruned: cuts at the k-th smallest magnitude over all shards, ties included.

One cut over all weights sends some 700 KiB, whatever the model's size; many are found together, each
then sends some 14 KiB.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.sharding.collectives import Collectives
from mgpp.sharding.kth_smallest import Kth, Ranked, kth_smallest, magnitude_bits
from mgpp.sharding.kth_smallest import sent_bytes as counted_bytes
from mgpp.sharding.shards import Shard


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights (matrices) that are cut at one threshold.

    Attributes:
        indices: their places among all prunable weights (`Shard.index`), rising.
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
        tied_quota: by position in this rank's list of shards, how many weights equal to the k-th
            magnitude are pruned of it, first come first, none unless given; None where all are, the
            usual case.
    """

    k: int
    bits: int
    tied_quota: Mapping[int, int] | None

    @property
    def threshold(self) -> float:
        """The k-th smallest magnitude (0 when k = 0)."""
        return float(torch.tensor(self.bits, dtype=torch.int32).view(torch.float32))


def find_cut(
    shards: Sequence[Shard], k: int, full_numels: Sequence[int], collectives: Collectives
) -> Cut:
    """Find which k weights have the smallest magnitude over all shards of all ranks.

    Args:
        shards: this rank's shards.
        k: how many weights are to be pruned, 0 <= k <= all prunable weights.
        full_numels: elements of each whole prunable weight (matrix), by `Shard.index`.
        collectives: the group over which the weights are sharded.

    Raises:
        ValueError: if k is negative or exceeds the number of weights there are.
    """
    group = Group(indices=tuple(range(len(full_numels))), k=k)
    return find_cuts(shards, [group], full_numels, collectives)[0]


def find_cuts(
    shards: Sequence[Shard],
    groups: Sequence[Group],
    full_numels: Sequence[int],
    collectives: Collectives,
) -> list[Cut]:
    """Find for each group which k of its elements have the smallest magnitude over all ranks.

    Ties at the k-th value are pruned in global order: by weight, then by position in it. That order does
    not depend on how the weights are sharded.

    Args:
        shards: this rank's shards; those in no group are passed over.
        groups: the same on all ranks; no weight is in two.
        full_numels: elements of each whole prunable weight (matrix), by `Shard.index`.
        collectives: the group over which the weights are sharded.

    Raises:
        ValueError: if a k is negative or exceeds the number of elements there are.
    """
    group_of = {index: i for i, group in enumerate(groups) for index in group.indices}
    members: list[list[int]] = [[] for _ in groups]
    for position, shard in enumerate(shards):
        if shard.index in group_of:
            members[group_of[shard.index]].append(position)
    totals = [sum(full_numels[index] for index in group.indices) for group in groups]
    for group, total in zip(groups, totals, strict=True):
        if group.k < 0:
            raise ValueError(f"k must not be negative, got {group.k}")
        if group.k > total:
            raise ValueError(f"k = {group.k} exceeds the {total} weights there are")
    busy = [i for i, group in enumerate(groups) if group.k]
    found: dict[int, Kth] = {}
    if busy:
        ranked = [
            Ranked(shards=[shards[p] for p in members[i]], k=groups[i].k, total=totals[i])
            for i in busy
        ]
        found = dict(zip(busy, kth_smallest(ranked, collectives), strict=True))
    tied = [i for i, kth in found.items() if kth.place < kth.num_equal]
    quotas = _share_ties(
        [
            _Tied(
                indices=groups[i].indices,
                num_pruned=found[i].place,
                num_equal={
                    position: sum(int((c == found[i].bits).sum()) for c in patterns)
                    for position, patterns in zip(members[i], found[i].by_shard, strict=True)
                },
            )
            for i in tied
        ],
        shards,
        collectives,
    )
    by_group = dict(zip(tied, quotas, strict=True))
    return [
        Cut(k=group.k, bits=found[i].bits, tied_quota=by_group.get(i))
        if group.k
        else Cut(k=0, bits=0, tied_quota={})
        for i, group in enumerate(groups)
    ]


def sent_bytes(world_size: int, num_weights: int, num_groups: int = 1) -> int:
    """Return the most that a rank hands to reductions for one `find_cuts`, in bytes.

    Args:
        world_size: ranks over which the weights are sharded.
        num_weights: number of prunable weights (matrices) over the whole model.
        num_groups: how many cuts are found.
    """
    return counted_bytes(num_groups) + 8 * (num_weights + num_groups * world_size)


def kept_chunks(shards: Sequence[Shard], position: int, cut: Cut) -> Iterator[Tensor]:
    """Yield for each chunk of a shard an int32 tensor: 1 where weights stay, 0 where pruned.

    Args:
        shards: the list given to `find_cuts`.
        position: which shard of it.
        cut: the cut of its group.
    """
    quota = 0 if cut.tied_quota is None else cut.tied_quota.get(position, 0)
    for chunk in shards[position].chunks():
        bits = magnitude_bits(chunk)
        compare = torch.gt if cut.tied_quota is None else torch.ge
        keep = compare(bits, cut.bits, out=torch.empty_like(bits))
        if quota:
            tied = (bits == cut.bits).nonzero().squeeze(1)[:quota]
            keep[tied] = 0
            quota -= tied.numel()
        yield keep
    assert quota == 0, "the weights changed between the count and the cut"


@dataclass(frozen=True, kw_only=True)
class _Tied:
    """A group of which some elements equal to the k-th stay.

    Attributes:
        indices: the weights of the group, rising.
        num_pruned: how many of the equal elements are pruned.
        num_equal: how many this rank's shards hold, by position.
    """

    indices: Sequence[int]
    num_pruned: int
    num_equal: Mapping[int, int]


def _share_ties(
    tied: Sequence[_Tied], shards: Sequence[Shard], collectives: Collectives
) -> list[dict[int, int]]:
    """Divide the ties to prune among the shards, by position, in global order."""
    if not tied:
        return []
    mine = {index: 0 for group in tied for index in group.indices}
    for group in tied:
        for position, count in group.num_equal.items():
            mine[shards[position].index] += count
    totals = dict(zip(mine, collectives.sum(list(mine.values())), strict=True))
    quotas, straddled = {}, []
    for group in tied:
        left = group.num_pruned
        for index in group.indices:
            quotas[index] = min(left, totals[index])
            left -= quotas[index]
            if 0 < quotas[index] < totals[index]:
                straddled.append(index)
    # Only one weight of a group can be cut in two; there the ranks before this one take theirs first.
    held = collectives.by_rank_all([mine[index] for index in straddled])
    before = {
        index: sum(counts[: collectives.rank])
        for index, counts in zip(straddled, held, strict=True)
    }
    result = []
    for group in tied:
        shares = {}
        for position, count in group.num_equal.items():
            index = shards[position].index
            share = min(max(quotas[index] - before.get(index, 0), 0), count)
            if share:
                shares[position] = share
        result.append(shares)
    return result
