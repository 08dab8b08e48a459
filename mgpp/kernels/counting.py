"""The counts of `mgpp.sharding.counting`, `.displacement` and `mgpp.masking.lamp` on a GPU, in Triton.

Each is one launch over all tensors (`nth_equal` two), reads each value once and waits for nothing. Triton
comes with torch's builds for GPUs; this module is imported only where there is one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpp.kernels.tables import addresses, blocks_of, launch

_BLOCK, _TILE = 1 << 16, 2048
_DISPLACEMENT_BINS, _DISPLACEMENT_SHIFT, _DISPLACEMENT_FIRST = 2048, 16, 0x39800000 >> 16
_MAGNITUDE_BINS, _MAGNITUDE_SHIFT = 2048, 17


@triton.jit
def _block(blocks, pointers):  # type: ignore[no-untyped-def]
    """Return the patterns of this program's tensor, its first element, its end and its matrix."""
    row = blocks + tl.program_id(0) * 4
    which = tl.load(row)
    patterns = tl.load(pointers + which).to(tl.pointer_type(tl.int32))
    return which, patterns, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(patterns, start, end, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Return the numbers of the next elements, of which some may be past the end, and their patterns."""
    at = start + tl.arange(0, TILE)
    return at, tl.load(patterns + at, mask=at < end, other=0) & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def _count_digits(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    groups,
    lows,
    counts,
    shift,
    BINS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    _, patterns, begin, end, matrix = _block(blocks, pointers)
    group = tl.load(groups + matrix)
    if group >= 0:
        low = tl.load(lows + group).to(tl.int32)
        # What is not counted goes to the first of as many bins again.
        found = tl.zeros([2 * BINS], dtype=tl.int32)
        for start in range(begin, end, TILE):
            at, bits = _tile(patterns, start, end, TILE)
            digits = (bits - low) >> shift
            counted = (at < end) & (digits >= 0) & (digits < BINS)
            found += tl.histogram(tl.where(counted, digits, BINS), 2 * BINS)
        bins = tl.arange(0, 2 * BINS)
        into = counts + group * BINS + bins
        tl.atomic_add(into, found.to(tl.int64), mask=(bins < BINS) & (found > 0))


def count_digits(
    values: Sequence[Tensor],
    places: Sequence[int],
    groups: Tensor,
    lows: Tensor,
    shift: int,
    num_bins: int,
) -> Tensor:
    """As `mgpp.sharding.counting.count_digits`."""
    counts = torch.zeros(len(lows), num_bins, dtype=torch.int64, device=lows.device)
    blocks = blocks_of(values, places, _BLOCK)
    launch(
        _count_digits,
        blocks,
        addresses(values),
        groups,
        lows,
        counts,
        shift,
        BINS=num_bins,
        TILE=_TILE,
    )
    return counts


@triton.jit  # type: ignore[untyped-decorator]
def _count_around(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    cuts,
    counts,
    num_matrices,
    TILE: tl.constexpr,  # noqa: N803
):
    _, patterns, begin, end, matrix = _block(blocks, pointers)
    cut = tl.load(cuts + matrix)
    below = tl.zeros([TILE], dtype=tl.int32)
    equal = tl.zeros([TILE], dtype=tl.int32)
    for start in range(begin, end, TILE):
        at, bits = _tile(patterns, start, end, TILE)
        below += ((at < end) & (bits < cut)).to(tl.int32)
        equal += ((at < end) & (bits == cut)).to(tl.int32)
    tl.atomic_add(counts + matrix, tl.sum(below, axis=0).to(tl.int64))
    tl.atomic_add(counts + num_matrices + matrix, tl.sum(equal, axis=0).to(tl.int64))


def count_around(values: Sequence[Tensor], places: Sequence[int], cuts: Tensor) -> Tensor:
    """As `mgpp.sharding.counting.count_around`."""
    counts = torch.zeros(2, len(cuts), dtype=torch.int64, device=cuts.device)
    blocks = blocks_of(values, places, _BLOCK)
    launch(_count_around, blocks, addresses(values), cuts, counts, len(cuts), TILE=_TILE)
    return counts


@triton.jit  # type: ignore[untyped-decorator]
def _count_equal(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    cuts,
    counts,
    TILE: tl.constexpr,  # noqa: N803
):
    _, patterns, begin, end, matrix = _block(blocks, pointers)
    cut = tl.load(cuts + matrix)
    equal = tl.zeros([TILE], dtype=tl.int32)
    for start in range(begin, end, TILE):
        at, bits = _tile(patterns, start, end, TILE)
        equal += ((at < end) & (bits == cut)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(equal, axis=0).to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _find_nth(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    cuts,
    missing,
    counts,
    found,
    TILE: tl.constexpr,  # noqa: N803
):
    _, patterns, begin, end, matrix = _block(blocks, pointers)
    nth = tl.load(missing + tl.program_id(0))  # of this block's equal ones
    if (nth > 0) & (nth <= tl.load(counts + tl.program_id(0))):
        cut = tl.load(cuts + matrix)
        before = nth * 0
        for start in range(begin, end, TILE):
            at, bits = _tile(patterns, start, end, TILE)
            equal = ((at < end) & (bits == cut)).to(tl.int32)
            place = before + tl.cumsum(equal, axis=0)
            here = (equal > 0) & (place == nth)
            tl.store(found + matrix + at * 0, at + 1, mask=here)
            before += tl.sum(equal, axis=0)


def nth_equal(values: Sequence[Tensor], places: Sequence[int], cuts: Tensor, nth: Tensor) -> Tensor:
    """As `mgpp.sharding.counting.nth_equal`."""
    found = torch.zeros_like(nth)
    blocks = blocks_of(values, places, _BLOCK)
    if not len(blocks):
        return found
    counts, pointers = torch.empty_like(blocks[:, 0]), addresses(values)
    launch(_count_equal, blocks, pointers, cuts, counts, TILE=_TILE)
    # How many equal ones lie before a block: less those before the first block of its matrix.
    matrix, before = blocks[:, 3], counts.cumsum(0) - counts
    first = torch.full_like(nth, 1 << 62).scatter_reduce_(0, matrix, before, "amin")
    missing = nth[matrix] - before + first[matrix]
    launch(_find_nth, blocks, pointers, cuts, missing, counts, found, TILE=_TILE)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _count_displacements(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    masks,
    cuts,
    counts,
    BINS: tl.constexpr,  # noqa: N803
    SHIFT: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    which, patterns, begin, end, matrix = _block(blocks, pointers)
    weights = patterns.to(tl.pointer_type(tl.float32))
    mask = tl.load(masks + which).to(tl.pointer_type(tl.uint8))
    cut = tl.load(cuts + matrix)
    found = tl.zeros([2 * BINS], dtype=tl.int32)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < end
        ratio = tl.div_rn(tl.abs(tl.load(weights + at, mask=inside, other=0.0)), cut)
        bins = (ratio.to(tl.int32, bitcast=True) >> SHIFT) - FIRST
        bins = tl.minimum(tl.maximum(bins, 0), BINS - 1)
        bits = tl.load(mask + at // 8, mask=inside, other=0).to(tl.int32)
        kept = ((bits >> (at % 8).to(tl.int32)) & 1) != 0
        found += tl.histogram(tl.where(inside & (kept == 0), bins, BINS), 2 * BINS)
    bins = tl.arange(0, 2 * BINS)
    tl.atomic_add(counts + bins, found.to(tl.int64), mask=(bins < BINS) & (found > 0))


def count_displacements(
    values: Sequence[Tensor], places: Sequence[int], keep: Sequence[Tensor], cuts: Tensor
) -> Tensor:
    """As `mgpp.sharding.displacement.count_displacements`."""
    counts = torch.zeros(_DISPLACEMENT_BINS, dtype=torch.int64, device=cuts.device)
    blocks = blocks_of(values, places, _BLOCK)
    launch(
        _count_displacements,
        blocks,
        addresses(values),
        addresses(keep),
        cuts,
        counts,
        BINS=_DISPLACEMENT_BINS,
        SHIFT=_DISPLACEMENT_SHIFT,
        FIRST=_DISPLACEMENT_FIRST,
        TILE=_TILE,
    )
    return counts


@triton.jit  # type: ignore[untyped-decorator]
def _largest_patterns(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    found,
    TILE: tl.constexpr,  # noqa: N803
):
    _, patterns, begin, end, matrix = _block(blocks, pointers)
    largest = tl.zeros([TILE], dtype=tl.int32)
    for start in range(begin, end, TILE):
        _at, bits = _tile(patterns, start, end, TILE)
        largest = tl.maximum(largest, bits)
    tl.atomic_max(found + matrix, tl.max(largest, axis=0))


def largest_patterns(values: Sequence[Tensor], places: Sequence[int], num_matrices: int) -> Tensor:
    """As `mgpp.masking.lamp.largest_patterns`."""
    found = torch.zeros(num_matrices, dtype=torch.int32, device=values[0].device)
    blocks = blocks_of(values, places, _BLOCK)
    launch(_largest_patterns, blocks, addresses(values), found, TILE=_TILE)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _count_magnitudes(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    lowest,
    found,
    first,
    num_rows,
    BINS: tl.constexpr,  # noqa: N803
    SHIFT: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    _, patterns, begin, end, matrix = _block(blocks, pointers)
    row = matrix - first
    if (row >= 0) & (row < num_rows):
        edge = tl.load(lowest + matrix).to(tl.int32)
        for start in range(begin, end, TILE):
            at = start + tl.arange(0, TILE)
            inside = at < end
            bits = tl.load(patterns + at, mask=inside, other=0) & 0x7FFFFFFF
            into = found + row * BINS + tl.maximum((bits >> SHIFT) - edge, 0)
            excess = (bits & ((1 << SHIFT) - 1)).to(tl.int64)
            tl.atomic_add(into, excess * 0 + 1, mask=inside)
            tl.atomic_add(into + num_rows * BINS, excess, mask=inside)


def count_magnitudes(
    values: Sequence[Tensor], places: Sequence[int], lowest: Tensor, first: int, num_rows: int
) -> Tensor:
    """As `mgpp.masking.lamp.count_magnitudes`."""
    size = (2, num_rows, _MAGNITUDE_BINS)
    found = torch.zeros(size, dtype=torch.int64, device=lowest.device)
    blocks = blocks_of(values, places, _BLOCK)
    launch(
        _count_magnitudes,
        blocks,
        addresses(values),
        lowest,
        found,
        first,
        num_rows,
        BINS=_MAGNITUDE_BINS,
        SHIFT=_MAGNITUDE_SHIFT,
        TILE=_TILE,
    )
    return found
