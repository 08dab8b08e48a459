"""LAMP: how many weights of each matrix to prune by a layer-adaptive score (arXiv 2010.07611).

A weight's score is w^2 over the sum of squares of all weights of its matrix that are not smaller. One cut
on that score over all matrices decides how many of each are pruned; within a matrix the score rises
with |w|, so that those are its smallest. A matrix's largest weight scores 1, whatever the matrix's scale.

The counts come from histograms of magnitudes, with the mean of each bin, summed over the ranks as
integers, so that they are the same however the weights are sharded. A bin holds magnitudes that differ by
less than 1 in 64, taken as evenly spread: a matrix's count is off by less than a thousandth of its
elements, or by one or two of them. Which weights these are is then found exactly, matrix by matrix.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mgpp.kernels.devices import chunks, moved
from mgpp.kernels.operators import operator
from mgpp.masking.allocation import filled_up
from mgpp.masking.threshold import Group
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.counting import magnitude_bits
from mgpp.sharding.stacks import Stacks, runs

_MOST_SENT = 16 << 20  # bytes that are reduced together
NUM_BINS = 2048
_SHIFT = 17  # leaves the exponent and the upper 6 of 23 bits: 32 octaves below the largest |w|
_ONE = 0x3FF0000000000000  # the bit pattern of 1.0 in float64


def lamp_groups(
    stacks: Stacks,
    groups: Sequence[Group],
    caps: Sequence[int],
    collectives: Collectives,
    least: Sequence[int] | None = None,
) -> list[Group]:
    """Divide each group's pruned elements among its matrices; all ranks must call.

    Args:
        stacks: this rank's magnitudes.
        groups: the same on all ranks; k is at most the sum of the group's caps.
        caps: the most elements of each matrix that may be pruned.
        collectives: the group over which the weights are sharded.
        least: the fewest elements of each matrix that are pruned; together at most k of their group.

    Returns:
        A group for each matrix, in the order of the groups.
    """
    histograms, tops = magnitude_histograms(stacks, collectives)
    least = [0] * stacks.num_matrices if least is None else least
    result = []
    for group in groups:
        indices = list(group.indices)
        counts = lamp_counts(
            histograms[:, indices],
            tops[indices],
            group.k,
            [caps[index] for index in indices],
            [least[index] for index in indices],
        )
        result += [
            replace(group, indices=(index,), k=k) for index, k in zip(indices, counts, strict=True)
        ]
    return result


def sent_bytes(world_size: int, num_matrices: int) -> int:
    """Return what a rank hands to reductions for one `lamp_groups`, in bytes; `_MOST_SENT` at once."""
    return 8 * num_matrices * (2 * NUM_BINS + world_size)


def magnitude_histograms(stacks: Stacks, collectives: Collectives) -> tuple[Tensor, Tensor]:
    """Count the magnitudes of each matrix, over all ranks.

    Returns:
        int64 [2, matrices, NUM_BINS]: how many lie in each bin, the lowest with all that is smaller, and
        the sum of the bits by which they exceed its lower edge; and the upper bits of each matrix's
        largest magnitude, which its last bin has: int64 [matrices].
    """
    held = [0] * stacks.num_matrices
    if stacks.values:
        largest = largest_patterns(stacks.values, stacks.places, stacks.num_matrices)
        held = largest.bitwise_right_shift_(_SHIFT).tolist()
    tops = torch.tensor([max(of_ranks) for of_ranks in collectives.by_rank_all(held)])
    lowest = moved((tops - NUM_BINS + 1).clamp(min=0), stacks.device)
    numbers, parts = range(stacks.num_matrices), []
    size = _MOST_SENT // (8 * 2 * NUM_BINS)
    for batch in (numbers[i : i + size] for i in range(0, len(numbers), size)):
        some = stacks.holding(set(batch))
        counts = torch.zeros(2, len(batch), NUM_BINS, dtype=torch.int64)
        if some.values:
            counts = count_magnitudes(some.values, some.places, lowest, batch.start, len(batch))
        parts.append(collectives.summed(counts).cpu())
    return torch.cat(parts, dim=1), tops


@operator(
    "counting",
    fake=lambda values, places, num_matrices: values[0].new_empty(num_matrices, dtype=torch.int32),
)
def largest_patterns(values: Sequence[Tensor], places: Sequence[int], num_matrices: int) -> Tensor:
    """Return the largest bit pattern of a magnitude in each matrix, 0 where none is held: int32.

    Args:
        values: as in `Stacks`.
        places: likewise.
        num_matrices: likewise.
    """
    found = torch.zeros(num_matrices, dtype=torch.int32)
    for which, begin, end, number in runs(values, places, range(num_matrices)):
        for chunk in chunks(values[which][begin:end]):
            found[number] = torch.maximum(found[number], magnitude_bits(chunk).max())
    return found


@operator(
    "counting",
    fake=lambda values, places, lowest, first, num_rows: lowest.new_empty(2, num_rows, NUM_BINS),
)
def count_magnitudes(
    values: Sequence[Tensor], places: Sequence[int], lowest: Tensor, first: int, num_rows: int
) -> Tensor:
    """Count the magnitudes of some matrices in bins of their upper bits.

    Args:
        values: as in `Stacks`.
        places: likewise.
        lowest: int64, by matrix: the upper bits that the lowest bin stands for.
        first: the number of the first matrix that is counted.
        num_rows: how many are.

    Returns:
        int64 [2, num_rows, NUM_BINS], as of `magnitude_histograms`.
    """
    found = torch.zeros(2, num_rows, NUM_BINS, dtype=torch.int64)
    edges = lowest.tolist()
    for which, begin, end, number in runs(values, places, range(len(edges))):
        if not first <= number < first + num_rows:
            continue
        for chunk in chunks(values[which][begin:end]):
            bits = magnitude_bits(chunk)
            bins = (bits >> _SHIFT).sub_(edges[number]).clamp_(min=0)
            excess = bits.bitwise_and_((1 << _SHIFT) - 1).double()  # its sums are exact
            counts = torch.bincount(bins, minlength=NUM_BINS)
            sums = torch.bincount(bins, weights=excess, minlength=NUM_BINS)
            found[:, number - first] += torch.stack([counts, sums.long()])
    return found


def lamp_counts(
    histograms: Tensor,
    tops: Tensor,
    k: int,
    caps: Sequence[int],
    least: Sequence[int] | None = None,
) -> list[int]:
    """Return how many elements of each weight to prune so that k are in all, by one cut on the score.

    The cut is searched among all floats from 0 to 1; what it leaves over, where many scores are equal, is
    shared in proportion.

    Args:
        histograms: int64 [2, weights, NUM_BINS], as `magnitude_histograms` returns it.
        tops: int64 [weights], likewise.
        k: at most the sum of the caps.
        caps: the most that may be pruned of each.
        least: the fewest that are pruned of each, none unless given; together at most k.
    """
    scores = _edge_scores(histograms, tops)
    ends = torch.nn.functional.pad(histograms[0].cumsum(1), (1, 0)).double()
    most = torch.tensor(caps, dtype=torch.float64)
    fewest = torch.tensor(least or [0] * len(caps), dtype=torch.float64)

    def at(pattern: int) -> Tensor:
        cut = torch.tensor(pattern).view(torch.float64)
        return _num_below(scores, ends, cut).clamp(fewest, most)

    low, high = -1, _ONE  # at -1 no more is pruned than must be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if float(at(middle).sum()) >= k else (middle, high)
    below, above = fewest if low < 0 else at(low), at(high)
    gap = float((above - below).sum())
    share = (k - float(below.sum())) / gap if gap else 0.0
    return _whole(below + (above - below) * share, k, caps)


def _edge_scores(histograms: Tensor, tops: Tensor) -> Tensor:
    """Return the score at each bin's lower edge, and 1 at the end: float64 [weights, NUM_BINS + 1]."""
    first = (tops - NUM_BINS + 1).clamp(min=0).unsqueeze(1)
    patterns = (first + torch.arange(NUM_BINS + 1)) << _SHIFT
    edges = patterns.to(torch.int32).view(torch.float32).double()
    edges[:, 0] = 0.0
    # Scores are quotients of squares: in units of the largest magnitude, for float32's own range is wide.
    edges = edges / edges[:, -1:]
    lower, upper = edges[:, :-1], edges[:, 1:]
    counts, sums = histograms.double()
    means = lower + (upper - lower) * sums / counts.clamp(min=1) / (1 << _SHIFT)
    squares = counts * means * means
    suffixes = squares.flip(1).cumsum(1).flip(1)
    scores = torch.where(suffixes > 0, lower * lower / suffixes, 1.0).clamp(max=1.0)
    scores = torch.nn.functional.pad(scores, (0, 1), value=1.0).cummax(1).values
    scores[tops == 0] = 0.0  # nothing but zeros: all of them are pruned before any other weight
    return scores


def _num_below(scores: Tensor, ends: Tensor, cut: Tensor) -> Tensor:
    """Return how many of each weight score up to the cut: float64 [weights], linear within a bin."""
    targets = cut.expand(len(scores), 1).contiguous()
    bins = torch.searchsorted(scores, targets, right=True) - 1
    inside = bins.clamp(max=NUM_BINS - 1)
    low, high = scores.gather(1, inside), scores.gather(1, inside + 1)
    begin, end = ends.gather(1, inside), ends.gather(1, inside + 1)
    found = torch.where(bins < NUM_BINS, begin + (end - begin) * (cut - low) / (high - low), end)
    return found.squeeze(1)


def _whole(shares: Tensor, k: int, caps: Sequence[int]) -> list[int]:
    """Round shares, not above the caps, to whole numbers that add up to k: largest remainders first."""
    counts = [min(int(share), cap) for share, cap in zip(shares.tolist(), caps, strict=True)]
    remainders = [share - count for share, count in zip(shares.tolist(), counts, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (-remainders[i], i))
    return filled_up(counts, order, caps, k)
