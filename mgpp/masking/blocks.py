"""Blocks: their scores, the same bit for bit however they are sharded, and what is pruned with them.

A block's score is the mean of its elements' scores. Sums of floats depend on their order, so the scores
are summed as integers: multiples of one unit, some 2^-57 of the largest score, which a rounding to
float32 does not see. A block that lies on several ranks is summed by a reduction; the rank that holds its
first element decides on it.

MGPP's prior acts on each weight by itself here too; one over whole blocks would be another method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.kernels.devices import chunk_size
from mgpp.pattern import Tiling
from mgpp.sharding.bitmask import pack_bits
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.counting import magnitude_bits
from mgpp.sharding.shards import Shard
from mgpp.sharding.spans import Span, Straddling

_SUM_BITS = 62


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """The blocks of the weights.

    Attributes:
        tilings: by `Shard.index`.
        straddling: the spans that are cut.
        size: elements of a block.
    """

    tilings: Sequence[Tiling]
    straddling: Straddling
    size: int

    def held(self, shard: Shard) -> range:
        """Return the spans of which a shard holds anything."""
        span = self.tilings[shard.index].span
        if not shard.numel:
            return range(-(-shard.offset // span), -(-shard.offset // span))
        return range(shard.offset // span, -(-(shard.offset + shard.numel) // span))

    def owned(self, shard: Shard) -> range:
        """Return the spans of which a shard holds the first element."""
        span = self.tilings[shard.index].span
        return range(-(-shard.offset // span), -(-(shard.offset + shard.numel) // span))

    @property
    def tiles(self) -> list[int]:
        """Blocks of a span, by `Shard.index`."""
        return [tiling.num_tiles for tiling in self.tilings]


def block_shards(
    shards: Sequence[Shard],
    grid: BlockGrid,
    score: Callable[[Shard], Tensor],
    ordered: Callable[[Tensor], Tensor],
) -> list[Shard]:
    """Return shards of the blocks' scores, of the blocks that each rank decides on.

    Args:
        shards: this rank's shards; all ranks must call.
        grid: the blocks.
        score: returns the scores of a shard's elements, which may be negative; called twice, so that
            those of one shard at a time are in memory.
        ordered: makes scores floats that are not negative, in the same order.

    Raises:
        RuntimeError: if a score is not finite.
    """
    exponent = _largest_exponent(shards, score, grid.straddling.collectives)
    # All magnitudes are below 2^(exponent - 126), and the sums of them below 2^_SUM_BITS.
    shift = _SUM_BITS - (grid.size - 1).bit_length() - (exponent - 126)
    sums = [_partial_sums(shard, score(shard), grid, 2.0**shift) for shard in shards]
    parts: dict[Span, Tensor] = {}
    for shard, partial in zip(shards, sums, strict=True):
        for key in grid.straddling.of(shard, grid.tilings[shard.index].span):
            parts[key] = partial[key[1] - grid.held(shard).start]
    totals = grid.straddling.sum(parts, grid.tiles, torch.int64)
    result = []
    for shard, partial in zip(shards, sums, strict=True):
        held, owned = grid.held(shard), grid.owned(shard)
        for key in grid.straddling.of(shard, grid.tilings[shard.index].span):
            partial[key[1] - held.start] = totals[key].to(partial.device)
        mine = partial[len(held) - len(owned) :].reshape(-1)
        means = (mine.to(torch.float64) * 2.0**-shift / grid.size).to(torch.float32)
        tiles = grid.tilings[shard.index].num_tiles
        result.append(
            Shard(
                name=shard.name,
                index=shard.index,
                full_shape=(shard.full_numel // grid.size,),
                offset=owned.start * tiles,
                numel=len(owned) * tiles,
                flat=ordered(means),
                start=0,
            )
        )
    return result


def element_keeps(
    shards: Sequence[Shard], grid: BlockGrid, decided: Sequence[Tensor]
) -> list[Tensor]:
    """Return for each shard which of its blocks stay, after all ranks have exchanged those that they cut.

    Args:
        shards: this rank's shards; all ranks must call.
        grid: the blocks.
        decided: by shard, 1-D bool: which of the blocks that it decides on stay.

    Returns:
        By shard, 2-D uint8: a row a span that it holds anything of, a column a block.
    """
    parts: dict[Span, Tensor] = {}
    keeps = []
    for shard, mine in zip(shards, decided, strict=True):
        held, owned = grid.held(shard), grid.owned(shard)
        tiling = grid.tilings[shard.index]
        keep = torch.zeros(len(held), tiling.num_tiles, dtype=torch.uint8, device=shard.flat.device)
        keep[len(held) - len(owned) :] = mine.view(-1, tiling.num_tiles)
        for key in grid.straddling.of(shard, tiling.span):
            if key[1] in owned:
                parts[key] = keep[key[1] - held.start]
        keeps.append(keep)
    exchanged = grid.straddling.sum(parts, grid.tiles, torch.uint8)
    for shard, keep in zip(shards, keeps, strict=True):
        for key in grid.straddling.of(shard, grid.tilings[shard.index].span):
            keep[key[1] - grid.held(shard).start] = exchanged[key].to(keep.device)
    return keeps


def packed_elements(shard: Shard, grid: BlockGrid, keep: Tensor) -> Tensor:
    """Return the packed mask of a shard's elements by that of its blocks (`element_keeps`)."""
    tiling = grid.tilings[shard.index]
    rows = keep.repeat_interleave(tiling.columns, dim=1)  # a stored row of each span
    whole = rows.unsqueeze(1).expand(-1, tiling.rows, -1).reshape(-1)
    first = shard.offset - grid.held(shard).start * tiling.span
    return pack_bits(whole[first : first + shard.numel].to(torch.bool))


def _largest_exponent(
    shards: Sequence[Shard], score: Callable[[Shard], Tensor], collectives: Collectives
) -> int:
    """Return the largest exponent among the scores of all ranks, biased as float32 has it, at least 1."""
    found = torch.zeros(256, dtype=torch.int64)
    tops = [magnitude_bits(score(shard)).max() for shard in shards if shard.numel]
    if tops:
        found = torch.stack(tops).bitwise_right_shift_(23).cpu().bincount(minlength=256)
    largest = max((e for e, count in enumerate(collectives.sum(found)) if count), default=0)
    if largest == 255:
        raise RuntimeError("scores are not finite: the weights or what the method keeps are not")
    return max(largest, 1)


def _partial_sums(shard: Shard, scores: Tensor, grid: BlockGrid, scale: float) -> Tensor:
    """Return the sums over what a shard holds of blocks: 2-D int64, a row a span, a column a block."""
    tiling, held = grid.tilings[shard.index], grid.held(shard)
    sums = torch.empty(len(held), tiling.num_tiles, dtype=torch.int64, device=shard.flat.device)
    step = max(chunk_size(shard.flat.device) // tiling.span, 1)
    for first in range(held.start, held.stop, step):
        last = min(first + step, held.stop)
        begin = max(first * tiling.span, shard.offset)
        end = min(last * tiling.span, shard.offset + shard.numel)
        spans = torch.zeros(
            (last - first) * tiling.span, dtype=torch.int64, device=shard.flat.device
        )
        values = scores[begin - shard.offset : end - shard.offset]
        spans[begin - first * tiling.span : end - first * tiling.span] = (
            values.to(torch.float64).mul_(scale).to(torch.int64)
        )
        blocks = spans.view(last - first, tiling.rows, tiling.num_tiles, tiling.columns)
        sums[first - held.start : last - held.start] = blocks.sum(dim=(1, 3))
    return sums
