"""Counts of bit patterns over many ranges of matrices at once, each count an operator of its own.

For non-negative float32 the order of values is the order of their bit patterns; clearing the sign bit
makes -0.0 equal 0.0. On a CPU the operators are plain torch, chunk by chunk; on GPUs kernels of
`mgpp.kernels.counting`. They count this rank's values; sums over ranks are the caller's.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from mgpp.kernels.devices import chunks
from mgpp.kernels.operators import operator
from mgpp.sharding.stacks import runs

GREATEST = 0x7FFFFFFF  # above the patterns of all numbers


def magnitude_bits(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the bit pattern of |w| as int32, ordered as the magnitudes are; in `out` if given."""
    magnitudes = torch.abs(weight, out=None if out is None else out.view(torch.float32))
    return magnitudes.view(torch.int32)


def magnitude_of(pattern: int) -> float:
    """Return the magnitude that has a bit pattern."""
    return float(struct.unpack("<f", struct.pack("<i", pattern))[0])


def pattern_of(magnitude: float) -> int:
    """Return the bit pattern of a magnitude, rounded to float32."""
    return int(struct.unpack("<i", struct.pack("<f", magnitude))[0])


@operator(
    "counting",
    fake=lambda values, places, groups, lows, shift, num_bins: lows.new_empty(
        len(lows), num_bins, dtype=torch.int64
    ),
)
def count_digits(
    values: Sequence[Tensor],
    places: Sequence[int],
    groups: Tensor,
    lows: Tensor,
    shift: int,
    num_bins: int,
) -> Tensor:
    """Count a digit of the patterns of each group of matrices: the bits from `shift` on, above `low`.

    Args:
        values: as in `Stacks`.
        places: likewise.
        groups: int64, by matrix: its group; -1 where it is in none.
        lows: int64, by group: what the digit is counted from; what lies below, or above the last bin, is
            not counted.
        shift: the digit's lowest bit.
        num_bins: values of the digit, a power of two.

    Returns:
        int64 [groups, num_bins].
    """
    counts = torch.zeros(len(lows), num_bins + 2, dtype=torch.int64)
    starts = lows.tolist()
    for which, begin, end, group in runs(values, places, groups.tolist()):
        if group < 0:
            continue
        for chunk in chunks(values[which][begin:end]):
            digits = magnitude_bits(chunk).sub_(starts[group]).bitwise_right_shift_(shift)
            # What lies below and above has bins of its own, which is faster than leaving it out.
            digits.clamp_(-1, num_bins).add_(1)
            counts[group].add_(torch.bincount(digits, minlength=num_bins + 2))
    return counts[:, 1:-1].clone(memory_format=torch.contiguous_format)


@operator(
    "counting", fake=lambda values, places, cuts: cuts.new_empty(2, len(cuts), dtype=torch.int64)
)
def count_around(values: Sequence[Tensor], places: Sequence[int], cuts: Tensor) -> Tensor:
    """Count the patterns below and equal to the cut of each matrix.

    Args:
        values: as in `Stacks`.
        places: likewise.
        cuts: int32, by matrix: a pattern.

    Returns:
        int64 [2, matrices].
    """
    counts = torch.zeros(2, len(cuts), dtype=torch.int64)
    keys = list(enumerate(cuts.tolist()))
    for which, begin, end, (number, cut) in runs(values, places, keys):
        for chunk in chunks(values[which][begin:end]):
            bits = magnitude_bits(chunk)
            # Written as int32 comparisons are four times faster than as bool (AVX2).
            marks = torch.eq(bits, cut, out=torch.empty_like(bits))
            counts[1, number] += marks.sum(dtype=torch.int32)
            counts[0, number] += torch.lt(bits, cut, out=marks).sum(dtype=torch.int32)
    return counts


@operator("counting", fake=lambda values, places, cuts, nth: torch.empty_like(nth))
def nth_equal(values: Sequence[Tensor], places: Sequence[int], cuts: Tensor, nth: Tensor) -> Tensor:
    """Find the n-th element of each matrix whose pattern equals the cut.

    Args:
        values: as in `Stacks`.
        places: likewise.
        cuts: int32, by matrix: a pattern.
        nth: int64, by matrix: at most as many as are equal; 0 where none is asked for.

    Returns:
        int64, by matrix: the element of its range that follows the n-th; 0 where none was asked for.
    """
    found = torch.zeros(len(cuts), dtype=torch.int64)
    keys = list(zip(range(len(cuts)), cuts.tolist(), nth.tolist(), strict=True))
    for which, begin, end, (number, cut, asked) in runs(values, places, keys):
        missing, start = asked, begin
        for chunk in chunks(values[which][begin:end]):
            if not missing:
                break
            equal = (magnitude_bits(chunk) == cut).nonzero().squeeze(1)[:missing]
            missing -= len(equal)
            if len(equal) and not missing:
                found[number] = start + equal[-1] + 1
            start += len(chunk)
    return found
