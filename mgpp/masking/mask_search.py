"""Which weights one pruning prunes: the method's scores under pattern, budgets and bounds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgpp.masking.allocation import Allocation
from mgpp.masking.blocks import BlockGrid, block_shards, element_keeps, packed_elements
from mgpp.masking.kept_zeros import KeptZeros, cut_of_scores, zeros_first
from mgpp.masking.lamp import lamp_groups
from mgpp.masking.n_of_m import eligible_shards
from mgpp.masking.threshold import Cut, Group, find_cuts, packed_masks
from mgpp.methods.base import Method
from mgpp.pattern import Blocks, NofM
from mgpp.sharding.bitmask import unpack_bits
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.counting import count_around
from mgpp.sharding.shards import Shard
from mgpp.sharding.spans import Straddling
from mgpp.sharding.stacks import Stacks
from mgpp.sharding.stats import wrap_int64

_Cuts = dict[int, Cut]  # by the number of a matrix


@dataclass(frozen=True, kw_only=True)
class FoundMask:
    """What one pruning takes.

    Attributes:
        num_pruned: weights that are pruned, over all ranks.
        threshold: the largest score that is pruned; of blocks, their mean; of several cuts, the largest.
        cuts: the largest pruned magnitude of each matrix, by its number; None where weights are pruned
            by something else, a score or as blocks.
        digest: of all cuts, the same on all ranks if they found the same.
        keep: the mask of each of this rank's shards, packed.
    """

    num_pruned: int
    threshold: float
    cuts: dict[int, float] | None
    digest: int
    keep: list[Tensor]


class MaskSearch:
    """Chooses which weights are pruned, the same however they are sharded.

    Args:
        shards: this rank's shards.
        allocation: how much is pruned of which weights.
        collectives: the group over which the weights are sharded.
        zeros: weights that are pruned first, whatever their score; None if there are no such.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        allocation: Allocation,
        collectives: Collectives,
        zeros: KeptZeros | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self.allocation = allocation
        self.collectives = collectives
        self.zeros = zeros
        self.matrices = allocation.matrices
        self.pattern = allocation.placement.parsed_pattern()
        spans = [tiling.span for tiling in allocation.tilings]
        self._straddling = Straddling(shards, spans, collectives) if spans else None

    def search(self, method: Method, num_pruned: int, step: int) -> FoundMask:
        """Choose which weights are pruned; all ranks must call.

        Args:
            method: for its scores.
            num_pruned: weights to prune of all, before rounding to blocks; where a group has more kept
                zeros than its share, all of them are pruned.
            step: of the schedule.
        """
        groups = self.allocation.groups(num_pruned, step)
        least = None
        if self.zeros is not None:
            groups, least = self.zeros.at_least(groups), self.zeros.by_matrix
        if self.allocation.placement.scope == "lamp":
            stacks = self._stacks(self.shards, self.allocation.numels)
            groups = lamp_groups(stacks, groups, self.allocation.caps, self.collectives, least)
        search = self._search_blocks if isinstance(self.pattern, Blocks) else self._search_weights
        cuts, keep = search(method, groups)
        distinct = list({id(cut): cut for cut in cuts.values()}.values())
        digest = sum(cut.bits * (2 * i + 1) for i, cut in enumerate(distinct))
        largest = max(distinct, key=lambda cut: cut.bits)
        by_weight = None
        if method.prunes_by_magnitude() and not isinstance(self.pattern, Blocks):
            by_weight = {index: cut.threshold for index, cut in cuts.items()}
        return FoundMask(
            num_pruned=sum(group.k for group in groups) * self.allocation.unit,
            threshold=method.threshold(largest.threshold),
            cuts=by_weight,
            digest=wrap_int64(digest),
            keep=keep,
        )

    def _search_weights(
        self, method: Method, groups: Sequence[Group]
    ) -> tuple[_Cuts, list[Tensor]]:
        scored = self._scored(method)
        if self.zeros is not None:
            scored = zeros_first(scored, self.zeros.masks)
        if isinstance(self.pattern, NofM):
            assert self._straddling is not None
            tilings = self.allocation.tilings
            scored = eligible_shards(scored, self.pattern, tilings, self._straddling)
        return self._cut(scored, groups)

    def _search_blocks(self, method: Method, groups: Sequence[Group]) -> tuple[_Cuts, list[Tensor]]:
        assert self._straddling is not None
        grid = BlockGrid(
            tilings=self.allocation.tilings, straddling=self._straddling, size=self.allocation.unit
        )
        blocks = block_shards(self.shards, grid, method.addable_score, method.ordered)
        if self.zeros is not None:
            blocks = zeros_first(blocks, self.zeros.block_masks(grid))
        cuts, kept = self._cut(blocks, groups)
        decided = [unpack_bits(k, b.numel) for k, b in zip(kept, blocks, strict=True)]
        by_shard = element_keeps(self.shards, grid, decided)
        return cuts, [
            packed_elements(shard, grid, blocks_kept)
            for shard, blocks_kept in zip(self.shards, by_shard, strict=True)
        ]

    def _scored(self, method: Method) -> list[Shard]:
        """Return what is cut by: the method's scores laid out as the shards are, or the shards."""
        scored = []
        for shard in self.shards:
            scores = method.score(shard)
            scored.append(shard if scores is None else replace(shard, flat=scores, start=0))
        return scored

    def _cut(self, scored: Sequence[Shard], groups: Sequence[Group]) -> tuple[_Cuts, list[Tensor]]:
        """Cut what was scored, matrix by matrix; return the packed mask of each shard too."""
        sizes = self.allocation.sizes
        stacks = self._stacks(scored, sizes)
        caps = self.allocation.caps if self.allocation.placement.min_kept else None
        cuts = bounded_cuts(stacks, groups, sizes, caps, self.collectives)
        masks = packed_masks(stacks, cuts)
        if self.zeros is not None:
            # Matrices that are cut together have one cut, as before.
            of_scores = {id(cut): cut_of_scores(cut) for cut in cuts.values()}
            cuts = {number: of_scores[id(cut)] for number, cut in cuts.items()}
        return cuts, masks

    def _stacks(self, shards: Sequence[Shard], sizes: Sequence[int]) -> Stacks:
        return self.matrices.stacks(shards, sizes, self.collectives.device)


def bounded_cuts(
    stacks: Stacks,
    groups: Sequence[Group],
    full_numels: Sequence[int],
    caps: Sequence[int] | None,
    collectives: Collectives,
) -> dict[int, Cut]:
    """Find the cuts of all groups, with no weight losing more than its cap.

    A weight of which a group's cut takes more loses its cap's number instead, its lowest, and what that
    leaves goes to the other weights of the group by a cut of theirs, until none takes too much. That is
    the cut of the group over what may be pruned of each weight, whatever the order; a bound that was
    reached stays so, for the others' cuts only rise.

    Args:
        stacks: this rank's values.
        groups: the same on all ranks; k is at most the sum of the group's caps.
        full_numels: elements of each whole matrix, by its number.
        caps: the most elements of each matrix that may be pruned.
        collectives: the group over which the weights are sharded.

    Returns:
        The cut of each matrix, by its number; matrices cut together have the same object.
    """
    result: dict[int, Cut] = {}
    open_groups = list(groups)
    while open_groups:
        cuts = find_cuts(stacks, open_groups, full_numels, collectives)
        for group, cut in zip(open_groups, cuts, strict=True):
            result |= dict.fromkeys(group.indices, cut)
        if caps is None:
            break
        shared = [group for group in open_groups if len(group.indices) > 1 and group.k]
        num_pruned = _count_pruned(stacks, shared, result, collectives)
        open_groups = []
        for group in shared:
            over = [i for i in group.indices if num_pruned[i] > caps[i]]
            if over:
                held = [Group(indices=(i,), k=caps[i]) for i in over]
                rest = tuple(i for i in group.indices if i not in set(over))
                left = Group(indices=rest, k=group.k - sum(h.k for h in held))
                open_groups += [*held, left]
    return result


def _count_pruned(
    stacks: Stacks, groups: Sequence[Group], cuts: _Cuts, collectives: Collectives
) -> list[int]:
    """Count what is pruned of each matrix of some groups, over all ranks."""
    counts = [0] * stacks.num_matrices
    if not groups:
        return counts
    if stacks.values:
        bits = [cuts[i].bits if i in cuts else 0 for i in range(stacks.num_matrices)]
        cut_at = stacks.of_matrices(bits, torch.int32)
        below, equal = count_around(stacks.values, stacks.places, cut_at).tolist()
        for index in (index for group in groups for index in group.indices):
            quota = cuts[index].tied_quota
            counts[index] = below[index] + (equal[index] if quota is None else quota.get(index, 0))
    return collectives.sum(counts)
