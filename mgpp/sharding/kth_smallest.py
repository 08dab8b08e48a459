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
_LEAST_SAMPLE, _MOST_SAMPLE = 1 << 16, 1 << 18
# A stride that shares a factor with a matrix's width would see few of its columns.
_AVOIDED = (2, 3, 5, 7, 11, 13)
_SIGMAS = 6.0  # neighbours are alike, so the sample's error exceeds the binomial one somewhat
_TOGETHER = 8
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


def digits_of(num_groups: int) -> list[tuple[int, int]]:
    """Return (lowest bit, bits) of a pattern's digits, first digit first, for groups counted together."""
    width = 11 if num_groups <= 64 else 8
    return [(max(end - width, 0), min(width, end)) for end in range(31, 0, -width)]


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
    ks = [group.k for group in asked]
    digits = digits_of(len(asked))
    if not devices.has_kernels(stacks.device):
        stacks, ks = _narrowed(stacks, groups, asked, digits, collectives)
    found = _search(stacks, groups, ks, digits, collectives)
    kths = [Kth(bits=bits, place=place, num_equal=size) for bits, place, size in found.t().tolist()]
    return kths, stacks


def _search(
    stacks: Stacks,
    groups: Sequence[int],
    ks: Sequence[int],
    digits: Sequence[tuple[int, int]],
    collectives: Collectives,
) -> Tensor:
    """Find the leading digits of each group's k-th.

    Returns:
        int64 [3, groups]: the pattern with the other digits 0, the k-th's place among those with the same
        leading digits, and their number.
    """
    of_matrix = stacks.of_matrices(groups)
    places = torch.tensor(ks, device=stacks.device).unsqueeze(1)
    lows, sizes = torch.zeros_like(places), torch.zeros_like(places)
    for shift, bits in digits:
        counts = collectives.summed(
            count_digits(stacks.values, stacks.places, of_matrix, lows.view(-1), shift, 1 << bits)
        )
        ends = counts.cumsum(1)
        bins = torch.searchsorted(ends, places)
        sizes = counts.gather(1, bins)
        places = places - ends.gather(1, bins) + sizes
        lows = lows + (bins << shift)
    return torch.cat([lows, places, sizes], dim=1).t()


def _narrowed(
    stacks: Stacks,
    groups: Sequence[int],
    asked: Sequence[Asked],
    digits: Sequence[tuple[int, int]],
    collectives: Collectives,
) -> tuple[Stacks, list[int]]:
    """Return fewer values, each group's k-th and its equals among them, and its place there."""
    matrices: list[dict[int, Tensor]] = [{} for _ in asked]
    for which, begin, end, number in runs(stacks.values, stacks.places, range(len(groups))):
        if groups[number] >= 0:
            matrices[groups[number]][number] = stacks.values[which][begin:end]
    brackets = _brackets(matrices, asked, digits, collectives)
    asides = [
        _set_aside(of_group, *bracket, least=_LEAST_ASIDE // len(asked))
        for of_group, bracket in zip(matrices, brackets, strict=True)
    ]
    sums = collectives.sum(
        [n for a in asides for n in (a.below, a.between, a.below_among_values, a.is_lost)]
    )
    ks = []
    for i, (group, aside) in enumerate(zip(asked, asides, strict=True)):
        below, between, below_among_values, lost = sums[4 * i : 4 * i + 4]
        k = group.k
        if not lost and below < k <= below + between:
            matrices[i], k = aside.values, k - below + below_among_values
        ks.append(k)
    return _whole(matrices, len(groups)), ks


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
    matrices: Sequence[Mapping[int, Tensor]],
    asked: Sequence[Asked],
    digits: Sequence[tuple[int, int]],
    collectives: Collectives,
) -> list[tuple[int, int]]:
    """Return patterns between which, both included, each group's k-th lies, going by a sample."""
    samples = []
    for of_group, group in zip(matrices, asked, strict=True):
        stride = _stride(group, len(asked))
        samples.append(torch.cat([_NONE, *(value[::stride] for value in of_group.values())]))
    sizes = collectives.sum(list(map(len, samples)))
    lowest, highest = [], []
    for group, size in zip(asked, sizes, strict=True):
        share = group.k / group.total
        margin = _SIGMAS * math.sqrt(share * (1 - share) * size) + 1
        lowest.append(max(int(share * size - margin), 1))
        highest.append(min(int(share * size + margin) + 1, size))
    both = range(2 * len(asked))  # each sample twice: where the bracket begins, and where it ends
    twice = _whole([dict(zip(both, [*samples, *samples], strict=True))], len(both))
    found = _search(twice, both, [*lowest, *highest], digits[:2], collectives)[0].tolist()
    last = (1 << digits[1][0]) - 1
    return [
        (low if first > 1 else 0, high + last if end < size else GREATEST)
        for low, high, first, end, size in zip(
            found[: len(asked)], found[len(asked) :], lowest, highest, sizes, strict=True
        )
    ]


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
    """How many patterns lie below and in a bracket, and values by matrix: all in it, with some others.

    Of the values `below_among_values` lie below the bracket. They are lost where they would be too many
    to be worth their memory.
    """

    below: int
    between: int
    below_among_values: int
    values: dict[int, Tensor]
    is_lost: bool


def _set_aside(matrices: Mapping[int, Tensor], low: int, high: int, *, least: int) -> _Aside:
    """Count patterns below `low` and those from there to `high`, and keep the latter."""
    most = max(sum(map(len, matrices.values())) // _MOST_ASIDE, least)
    size = min(devices.chunk_size(torch.device("cpu")), max(map(len, matrices.values()), default=0))
    room = torch.empty(2, size, dtype=torch.int32)
    found = torch.zeros(4, size // _TOGETHER, dtype=torch.int32)
    values: dict[int, Tensor] = {}
    num_below = num_upto = num_kept = 0
    for number, matrix in matrices.items():
        kept = [room[0, :0]]
        for chunk in matrix.split(size):
            bits, marks = room[:, : len(chunk)]
            magnitude_bits(chunk, out=bits)
            # _TOGETHER at a time, far apart, are looked at as one: few columns then hold any that is
            # wanted. Comparisons written as int32 are four times faster than as bool, on AVX2.
            width = len(chunk) // _TOGETHER
            rows, marked = (t[: _TOGETHER * width].view(_TOGETHER, width) for t in (bits, marks))
            below, upto, all_below, all_upto = found[:, :width]
            torch.sum(torch.lt(rows, low, out=marked), dim=0, dtype=torch.int32, out=below)
            torch.sum(torch.le(rows, high, out=marked), dim=0, dtype=torch.int32, out=upto)
            all_below.add_(below)
            all_upto.add_(upto)
            if num_kept <= most:
                wanted = upto.sub_(below).nonzero().squeeze(1)
                kept.append(rows.index_select(1, wanted).view(-1))
                num_kept += len(kept[-1])
            if width * _TOGETHER < len(chunk):
                rest = bits[width * _TOGETHER :]
                num_below += int((rest < low).sum())
                num_upto += int((rest <= high).sum())
                kept.append(rest.clone())
        values[number] = torch.cat(kept).view(torch.float32)
    num_below += int(found[2].sum())
    num_upto += int(found[3].sum())
    is_lost = num_kept > most
    patterns = [] if is_lost else map(magnitude_bits, values.values())
    return _Aside(
        below=num_below,
        between=num_upto - num_below,
        below_among_values=sum(int((bits < low).sum()) for bits in patterns),
        values=values,
        is_lost=is_lost,
    )
