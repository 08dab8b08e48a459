"""How far pruned weights have moved from zero by the next pruning, in cuts: counted, never gathered.

Between two prunings nothing holds a pruned weight at zero; one that passes its cut comes back. Ratios
|w| / cut are counted in bins 1/128 of an octave wide and summed over the ranks as integers, so that a
quantile is the same however the weights are sharded, and right to less than one in a hundred.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import ceil

import torch
from torch import Tensor

from mgpp.kernels.devices import chunk_size
from mgpp.kernels.operators import operator
from mgpp.sharding.bitmask import slice_bits, unpack_bits
from mgpp.sharding.counting import magnitude_bits
from mgpp.sharding.stacks import runs

NUM_BINS = 2048
_SHIFT = 16  # leaves the exponent and the upper 7 of 23 bits
_LEAST = 2.0**-12  # what is less counts as not moved at all, what is 16 octaves above as that
_FIRST = 0x39800000 >> _SHIFT  # the bin of _LEAST


@operator(
    "counting",
    fake=lambda values, places, keep, cuts: cuts.new_empty(NUM_BINS, dtype=torch.int64),
)
def count_displacements(
    values: Sequence[Tensor], places: Sequence[int], keep: Sequence[Tensor], cuts: Tensor
) -> Tensor:
    """Count how far pruned weights lie from zero.

    Args:
        values: as in `Stacks`, before the new mask is applied.
        places: likewise.
        keep: their masks so far, packed.
        cuts: float32, by matrix: the magnitude at which it is about to be cut, above 0.

    Returns:
        int64 [NUM_BINS].
    """
    counts = torch.zeros(2 * NUM_BINS, dtype=torch.int64)
    size = chunk_size(cuts.device)
    for which, begin, end, cut in runs(values, places, cuts.tolist()):
        for start in range(begin, end, size):
            ratios = values[which][start : min(start + size, end)] / cut
            bins = magnitude_bits(ratios, out=ratios.view(torch.int32))
            bins.bitwise_right_shift_(_SHIFT).sub_(_FIRST).clamp_(0, NUM_BINS - 1)
            kept = unpack_bits(slice_bits(keep[which], start, len(ratios)), len(ratios))
            # Kept weights are counted apart instead of being left out, which is faster.
            bins.add_(kept.to(torch.int32), alpha=NUM_BINS)
            counts.add_(torch.bincount(bins, minlength=2 * NUM_BINS))
    return counts[:NUM_BINS].clone()


def displacement_quantile(counts: Sequence[int], share: float) -> float:
    """Return the ratio below which a share of the counted lies: its bin's middle, 0 of the lowest.

    Args:
        counts: NUM_BINS of them, with at least one counted.
        share: above 0, at most 1.
    """
    ends = list(accumulate(counts))
    index = bisect_left(ends, max(ceil(ends[-1] * share), 1))
    if index == 0:
        return 0.0
    octave, part = divmod(index, 128)
    return float(_LEAST * 2.0**octave * (1 + (part + 0.5) / 128))
