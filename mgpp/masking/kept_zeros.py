"""Zeros that a model begins with and keeps while it is pruned further: they are pruned first, always.

Scores are integers in the order of their floats (`magnitude_bits`). One more is added to all but those of
the kept zeros, which get 0: so these come before any other weight whatever the method's score, also
before weights that happen to score 0, and the cut is as exact as without them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mgpp.kernels.devices import bit_chunks, chunks
from mgpp.masking.allocation import Allocation
from mgpp.masking.blocks import BlockGrid, block_shards
from mgpp.masking.n_of_m import eligible_shards
from mgpp.masking.threshold import Cut, Group, packed_masks
from mgpp.pattern import NofM
from mgpp.sharding.bitmask import count_bits, pack_bits, slice_bits, unpack_bits
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.counting import GREATEST, magnitude_bits
from mgpp.sharding.shards import Shard
from mgpp.sharding.spans import Straddling
from mgpp.sharding.stacks import runs


class KeptZeros:
    """The weights that are zero as this is made, over all ranks; all ranks make it and call its methods.

    Args:
        shards: this rank's shards.
        allocation: how much is pruned of which weights.
        collectives: the group over which the weights are sharded.

    Attributes:
        masks: of each shard, packed: 1 where the weight was not zero. One bit a weight.
        by_matrix: how many zeros each matrix has, by its number.
    """

    def __init__(
        self, shards: Sequence[Shard], allocation: Allocation, collectives: Collectives
    ) -> None:
        self._shards = tuple(shards)
        self._position = {id(shard): i for i, shard in enumerate(self._shards)}
        self._allocation = allocation
        self._collectives = collectives
        self._stacks = allocation.matrices.stacks(shards, allocation.numels, collectives.device)
        zero = Cut(k=0, bits=0, tied_quota=None)
        self.masks = packed_masks(
            self._stacks, dict.fromkeys(range(self._stacks.num_matrices), zero)
        )
        self.by_matrix: list[int] = []
        self.count()

    def count(self) -> None:
        """Count the zeros of each matrix; to be called again after the masks were changed."""
        counts = [0] * self._stacks.num_matrices
        values, places = self._stacks.values, self._stacks.places
        for which, begin, end, number in runs(values, places, range(len(counts))):
            kept = count_bits(slice_bits(self.masks[which], begin, end - begin))
            counts[number] += end - begin - kept
        self.by_matrix = self._collectives.sum(counts)
        self._block_masks: list[Tensor] | None = None

    def units(self, numbers: Iterable[int]) -> int:
        """Return the zeros of some matrices, in units: elements, or whole blocks."""
        return sum(self.by_matrix[number] for number in numbers) // self._allocation.unit

    def at_least(self, groups: Sequence[Group]) -> list[Group]:
        """Return groups of which no less is pruned than they have zeros."""
        return [replace(group, k=max(group.k, self.units(group.indices))) for group in groups]

    def misfit(self) -> str:
        """Return why the zeros cannot all be among what is pruned in the end; "" if they can."""
        return self._misfit_of_pattern() or self._misfit_of_caps() or self._misfit_of_counts()

    def _misfit_of_caps(self) -> str:
        allocation = self._allocation
        for number, cap in enumerate(allocation.caps):
            if self.units([number]) > cap:
                placement = allocation.placement
                bound = f"min_kept {placement.min_kept}" if placement.min_kept else "the pattern"
                return (
                    f"keep_zeros: {self.by_matrix[number]} of the {allocation.numels[number]} weights of "
                    f"{allocation.names[number]} are zero at the start, and {bound} allows "
                    f"{cap * allocation.unit} at most; start from another model, or leave that out"
                )
        return ""

    def _misfit_of_counts(self) -> str:
        allocation = self._allocation
        end = allocation.schedule.prune_end
        for group in allocation.groups(allocation.num_pruned(end), end):
            held = self.units(group.indices)
            if held <= group.k:
                continue
            numel = sum(allocation.numels[number] for number in group.indices)
            others = len(group.indices) < len(allocation.names)
            advice = "raise sparsity"
            if others:
                advice += ", or let all weights compete (scope: global, no budgets)"
            return (
                f"keep_zeros: {held * allocation.unit} of the {numel} weights of {self._named(group)} "
                f"are zero at the start, and {group.k * allocation.unit} are to be zero in the end; "
                f"{advice}"
            )
        return ""

    def _named(self, group: Group) -> str:
        names = list(dict.fromkeys(self._allocation.names[number] for number in group.indices))
        if len(group.indices) == len(self._allocation.names):
            return "the model that are prunable"
        return names[0] if len(names) == 1 else f"the {len(names)} matrices from {names[0]} on"

    def _misfit_of_pattern(self) -> str:
        pattern, tilings = self._allocation.placement.parsed_pattern(), self._allocation.tilings
        if pattern is None:
            return ""
        spans = [tiling.span for tiling in tilings]
        straddling = Straddling(self._shards, spans, self._collectives)
        text = self._allocation.placement.pattern
        if isinstance(pattern, NofM):
            marked = [replace(s, flat=1 - self._marks(s), start=0) for s in self._shards]
            eligible = eligible_shards(marked, pattern, tilings, straddling)
            held_back = sum(
                int(((magnitude_bits(s.weight) == GREATEST) & (m.weight == 0)).sum())
                for s, m in zip(eligible, marked, strict=True)
            )
            count = self._collectives.sum([held_back])[0]
            what = f"zeros are too many for their groups of {pattern.of}"
        else:
            size = self._allocation.unit
            shares = self._zero_shares(BlockGrid(tilings=tilings, straddling=straddling, size=size))
            in_part = [int(((s.weight > 0) & (s.weight < 1)).sum()) for s in shares]
            count = self._collectives.sum([sum(in_part)])[0]
            what = "blocks are zero in part"
        if not count:
            return ""
        return (
            f"keep_zeros: the zeros at the start do not fit pattern {text!r}: {count} {what}; start from "
            "a model pruned by this pattern, or leave the pattern out"
        )

    def _marks(self, shard: Shard) -> Tensor:
        """Return 1.0 for the zeros of a shard and 0.0 for the others: 1-D float32."""
        mask = self.masks[self._position[id(shard)]]
        return 1 - unpack_bits(mask, shard.numel).to(torch.float32)

    def _zero_shares(self, grid: BlockGrid) -> list[Shard]:
        """Return of each block that this rank decides on which share of it is zero."""
        return block_shards(self._shards, grid, self._marks, lambda scores: scores)

    def block_masks(self, grid: BlockGrid) -> list[Tensor]:
        """Return the packed masks of the blocks that this rank decides on: 0 for one kept at zero."""
        if self._block_masks is None:  # the same at every pruning
            shares = self._zero_shares(grid)
            self._block_masks = [pack_bits(shard.weight < 1) for shard in shares]
        return self._block_masks


def zeros_first(scored: Sequence[Shard], masks: Sequence[Tensor]) -> list[Shard]:
    """Return shards of scores in the same order, with 0 for the kept zeros alone.

    Takes four bytes a score.

    Args:
        scored: this rank's shards of scores, not negative.
        masks: of each, packed: 0 for a kept zero.
    """
    result = []
    for shard, mask in zip(scored, masks, strict=True):
        bits = magnitude_bits(shard.weight)
        for part, packed in zip(chunks(bits), bit_chunks(mask), strict=True):
            kept = unpack_bits(packed, part.numel()).to(torch.int32)
            part.clamp_(max=GREATEST - 1).add_(1).mul_(kept)
        result.append(replace(shard, flat=bits.view(torch.float32), start=0))
    return result


def cut_of_scores(cut: Cut) -> Cut:
    """Return a cut through results of `zeros_first` as one through the scores."""
    return replace(cut, bits=max(cut.bits - 1, 0))
