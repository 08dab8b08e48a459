"""The k-th smallest of several groups of values spread over ranks, found by counting bit patterns.

For non-negative float32 the order of values is the order of their bit patterns, so nothing need be
gathered or sorted, only counted: one digit of the pattern after the other, in three or four passes. Every
count is summed over the ranks, so the result is the same bit for bit on any number of them. All groups'
counts share the same reductions, and where they are many a digit has fewer bits.

On a GPU every pass counts all values. On a CPU, where counting is slow beside reading, a strided sample
of each group tells two patterns between which its k-th lies almost surely; one pass counts the values
below and sets those between aside, some in a hundred, and the digits of those alone are counted. Where
the sample was wrong, or too many values are tied, all are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.kernels import devices
from mgpp.sharding.collectives import Collectives
from mgpp.sharding.counting import GREATEST, count_digits, magnitude_bits
from mgpp.sharding.stacks import Stacks, runs

_NONE = torch.empty(0)
_LEAST_SAMPLE, _MOST_SAMPLE = 1 << 16, 1 << 19
# A stride that shares a factor with a matrix's width would see few of its columns.
_AVOIDED = (2, 3, 5, 7, 11, 13)
_SIGMAS = 4.0  # of the sample's error; where it was more, all values are counted
_LINE, _LEAST_LINES = 16, 64  # values that are read from memory together
_TOGETHER = 16
_SPAN = 1 << 22  # values in which those to be set aside are looked for at a time
_MOST_ASIDE = 4  # at most one value in this many is set aside
_LEAST_ASIDE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A group of which the k-th smallest is asked.

    Attributes:
        indices: the numbers of its matrices.
        k: from 1 to `total`.
        total: elements of its matrices over all ranks.
    """

    indices: Sequence[int]
    k: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Kth:
    """The k-th smallest of a group.

    Attributes:
        bits: its pattern.
        place: its place among all that are equal to it, from 1.
        num_equal: how many those are, over all ranks.
    """

    bits: int
    place: int
    num_equal: int


def digits_of(num_groups: int, width: int = 31) -> list[tuple[int, int]]:
    """Return (lowest bit, bits) of the digits of so many bits, first digit first.

    Args:
        num_groups: that are counted together; where they are many, a digit has fewer bits.
        width: the bits that are not known yet.
    """
    size = 11 if num_groups <= 64 else 8
    return [(max(end - size, 0), min(size, end)) for end in range(width, 0, -size)]


def sent_bytes(num_groups: int) -> int:
    """Return the most that a rank hands to reductions for one `kth_smallest` of some groups, in bytes."""
    digits = digits_of(num_groups)
    sampled = 1 + sum(2 << bits for _, bits in digits[:2])
    return 8 * num_groups * (sampled + 4 + sum(1 << bits for _, bits in digits))


def kth_smallest(
    stacks: Stacks, asked: Sequence[Asked], collectives: Collectives
) -> tuple[list[Kth], Stacks]:
    """Find the k-th smallest of each group.

    Args:
        stacks: this rank's values; matrices in no group are passed over.
        asked: the same on all ranks; no matrix is in two.
        collectives: the group of ranks over which the values are spread.

    Returns:
        The k-th of each group; and values by the same matrices, not in their order, among which are all
        that are equal to the k-th of their group.
    """
    groups = [-1] * stacks.num_matrices
    for i, group in enumerate(asked):
        for index in group.indices:
            groups[index] = i
    ks, lows, width = [group.k for group in asked], [0] * len(asked), 31
    if not devices.has_kernels(stacks.device):
        stacks, ks, lows, width = _narrowed(stacks, groups, asked, collectives)
    found = _search(stacks, groups, ks, lows, digits_of(len(asked), width), collectives)
    return [Kth(bits=b, place=p, num_equal=n) for b, p, n in found.t().tolist()], stacks


def _search(
    stacks: Stacks,
    groups: Sequence[int],
    ks: Sequence[int],
    lows: Sequence[int],
    digits: Sequence[tuple[int, int]],
    collectives: Collectives,
) -> Tensor:
    """Find each group's k-th among the patterns that are not below its low, digit by digit.

    Returns:
        int64 [3, groups]: the pattern, less what further digits would add; the k-th's place among those
        that are the same so far, and their number.
    """
    of_matrix = stacks.of_matrices(groups)
    places, found = (stacks.of_matrices(numbers).unsqueeze(1) for numbers in (ks, lows))
    sizes = torch.zeros_like(places)
    for shift, bits in digits:
        counts = collectives.summed(
            count_digits(stacks.values, stacks.places, of_matrix, found.view(-1), shift, 1 << bits)
        )
        ends = counts.cumsum(1)
        bins = torch.searchsorted(ends, places)
        sizes = counts.gather(1, bins)
        places = places - ends.gather(1, bins) + sizes
        found = found + (bins << shift)
    return torch.cat([found, places, sizes], dim=1).t()


def _narrowed(
    stacks: Stacks, groups: Sequence[int], asked: Sequence[Asked], collectives: Collectives
) -> tuple[Stacks, list[int], list[int], int]:
    """Return fewer values, with each group's k-th and its equals among them.

    And its place there among those from a low on, the low, and how many bits may differ from that.
    """
    matrices: list[dict[int, Tensor]] = [{} for _ in asked]
    for which, begin, end, number in runs(stacks.values, stacks.places, range(len(groups))):
        if groups[number] >= 0:
            matrices[groups[number]][number] = stacks.values[which][begin:end]
    brackets = _brackets(matrices, asked, collectives)
    asides = [
        _set_aside(of_group, *bracket, least=_LEAST_ASIDE // len(asked))
        for of_group, bracket in zip(matrices, brackets, strict=True)
    ]
    sums = collectives.sum(
        [
            n
            for a in asides
            for n in (a.below, sum(map(len, (a.values or {}).values())), a.values is None)
        ]
    )
    ks, lows, width = [], [], 0
    for i, (group, aside, bracket) in enumerate(zip(asked, asides, brackets, strict=True)):
        below, between, lost = sums[3 * i : 3 * i + 3]
        low, high = bracket
        if aside.values is None or lost or not below < group.k <= below + between:
            below, low, high = 0, 0, GREATEST
        else:
            matrices[i] = aside.values
        ks.append(group.k - below)
        lows.append(low)
        width = max(width, (high - low).bit_length())
    return _whole(matrices, len(groups)), ks, lows, width


def _whole(matrices: Sequence[Mapping[int, Tensor]], num_matrices: int) -> Stacks:
    """Return values, by group and matrix, as whole matrices."""
    return Stacks(
        values=[value for of_group in matrices for value in of_group.values()],
        places=[
            n
            for of_group in matrices
            for number, value in of_group.items()
            for n in (number, 0, max(len(value), 1))
        ],
        num_matrices=num_matrices,
        device=torch.device("cpu"),
    )


def _brackets(
    matrices: Sequence[Mapping[int, Tensor]], asked: Sequence[Asked], collectives: Collectives
) -> list[tuple[int, int]]:
    """Return patterns between which, both included, each group's k-th lies, going by a sample."""
    samples = []
    for of_group, group in zip(matrices, asked, strict=True):
        stride = _stride(group, len(asked))
        samples.append(torch.cat([_NONE, *(_sample(v, stride) for v in of_group.values())]))
    sizes = collectives.sum(list(map(len, samples)))
    lowest, highest = [], []
    for group, size in zip(asked, sizes, strict=True):
        share = group.k / group.total
        margin = _SIGMAS * math.sqrt(share * (1 - share) * size) + 1
        lowest.append(max(int(share * size - margin), 1))
        highest.append(min(int(share * size + margin) + 1, size))
    both = range(2 * len(asked))  # each sample twice: where the bracket begins, and where it ends
    twice = _whole([dict(zip(both, [*samples, *samples], strict=True))], len(both))
    digits = digits_of(len(asked))[:2]
    begins = [0] * len(both)
    found = _search(twice, both, [*lowest, *highest], begins, digits, collectives)[0].tolist()
    last = (1 << digits[-1][0]) - 1
    return [
        (low if first > 1 else 0, high + last if end < size else GREATEST)
        for low, high, first, end, size in zip(
            found[: len(asked)], found[len(asked) :], lowest, highest, sizes, strict=True
        )
    ]


def _sample(values: Tensor, stride: int) -> Tensor:
    """Return every stride-th line of values, or every stride-th value where there are few."""
    if len(values) < stride * _LINE * _LEAST_LINES:
        return values[::stride]
    lines = values[: len(values) // _LINE * _LINE].view(-1, _LINE)
    return lines[::stride].reshape(-1)


def _stride(group: Asked, num_groups: int) -> int:
    """Return how far apart the sampled values of a group are."""
    least = max(_LEAST_SAMPLE // num_groups, _LEAST_SAMPLE // 4)
    most = max(_MOST_SAMPLE // num_groups, _LEAST_SAMPLE)
    stride = max(group.total // min(max(group.total // 32, least), most), 1)
    while any(stride % prime == 0 for prime in _AVOIDED):
        stride += 1
    return stride


@dataclass(frozen=True, kw_only=True)
class _Aside:
    """How many patterns lie below a bracket, and by matrix the values whose patterns lie in it.

    The values are None where they would be too many to be worth their memory.
    """

    below: int
    values: dict[int, Tensor] | None


def _set_aside(matrices: Mapping[int, Tensor], low: int, high: int, *, least: int) -> _Aside:
    """Count patterns below `low` and those from there to `high`, and keep the latter."""
    most = max(sum(map(len, matrices.values())) // _MOST_ASIDE, least)
    num_below = num_kept = 0
    values: dict[int, Tensor] = {}
    for number, matrix in matrices.items():
        kept = [_NONE]
        for span in matrix.split(_SPAN):
            rows = span[: len(span) // _TOGETHER * _TOGETHER].view(_TOGETHER, -1)
            rest = span[rows.numel() :]
            below, upto = _counts_by_column(rows, low, high)
            num_below += int(below.sum(dtype=torch.int32)) + int((magnitude_bits(rest) < low).sum())
            if num_kept <= most:
                wanted = upto.sub_(below).nonzero().squeeze(1)
                kept += [rows.index_select(1, wanted).view(-1), rest]
                num_kept += _TOGETHER * len(wanted)
        patterns = magnitude_bits(torch.cat(kept))
        patterns = patterns[(patterns >= low) & (patterns <= high)]
        values[number] = patterns.view(torch.float32)
    return _Aside(below=num_below, values=None if num_kept > most else values)


def _counts_by_column(rows: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Count in each column the patterns below `low`, and those up to `high`: int32.

    Values far apart are so looked at as one, and few columns have any that is wanted.
    """
    below, upto = torch.empty(2, rows.shape[1], dtype=torch.int32)
    size = devices.chunk_size(torch.device("cpu")) // _TOGETHER
    bits, marks = torch.empty(2, len(rows), min(size, rows.shape[1]), dtype=torch.int32)
    parts = (t.split(size, dim=-1) for t in (rows, below, upto))
    for values, below_here, upto_here in zip(*parts, strict=True):
        patterns, marked = (t[:, : values.shape[1]] for t in (bits, marks))
        magnitude_bits(values, out=patterns)
        # Written as int32 comparisons are four times faster than as bool (AVX2).
        torch.sum(torch.lt(patterns, low, out=marked), 0, dtype=torch.int32, out=below_here)
        torch.sum(torch.le(patterns, high, out=marked), 0, dtype=torch.int32, out=upto_here)
    return below, upto
