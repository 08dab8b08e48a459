"""The k-th smallest of several groups of values spread over ranks, found by counting bit patterns.

For non-negative float32 the order of values is the order of their bit patterns, so nothing need be
gathered or sorted, only counted. A strided sample of each group tells two patterns between which its k-th
lies almost surely; one pass over the values counts those below and sets those between aside, about one
in a hundred; the k-th is then found among them by counting one digit of the pattern after the other.
Every count is summed over the ranks, so the result is the same bit for bit on any number of them. Where
the sample was wrong, or too many values are tied, the digits of all values of the group are counted
instead. All groups' counts share the same reductions, and the more groups, the fewer bits a digit has.

Clearing the sign bit makes -0.0 equal 0.0.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.sharding.collectives import Collectives
from mgpp.sharding.shards import CHUNK, Shard

GREATEST = 0x7FFFFFFF  # above the patterns of all numbers
_LEAST_SAMPLE, _MOST_SAMPLE = 1 << 16, 1 << 20
# A stride that shares a factor with a matrix's width would see few of its columns.
_AVOIDED = (2, 3, 5, 7, 11, 13)
_SIGMAS = 6.0  # neighbours are alike, so the sample's error exceeds the binomial one somewhat
_SPAN = 1 << 20
_TOGETHER = 8
_MOST_ASIDE = 16  # at most one weight in this many is set aside


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What a k-th smallest is asked of: this rank's shards, k, and how many values all ranks hold."""

    shards: Sequence[Shard]
    k: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Kth:
    """The k-th smallest of a group.

    Attributes:
        bits: its pattern.
        place: its place among all that are equal to it, from 1.
        num_equal: how many those are.
        by_shard: patterns of each of this rank's shards, all among them that are equal to it.
    """

    bits: int
    place: int
    num_equal: int
    by_shard: Sequence[Iterable[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """How many bits are counted at once: the upper ones of a sample, and then one digit after another."""

    upper: int
    digit: int

    @classmethod
    def of(cls, num_groups: int) -> "Digits":
        """Return the bits for a number of groups that are counted together."""
        fewer = (num_groups - 1).bit_length()
        return cls(upper=max(16 - fewer, 9), digit=max(12 - fewer, 8))

    @property
    def rounds(self) -> int:
        """The most digits that a pattern has."""
        return -(-31 // self.digit)


def sent_bytes(num_groups: int) -> int:
    """Return the most that a rank hands to reductions for one `kth_smallest` of some groups, in bytes."""
    digits = Digits.of(num_groups)
    sample = (1 << digits.upper) + (2 << digits.digit)
    return 8 * num_groups * (sample + 3 + (digits.rounds << digits.digit))


def magnitude_bits(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the bit pattern of |w| as int32, ordered as the magnitudes are; in `out` if given."""
    return torch.bitwise_and(weight.view(torch.int32), GREATEST, out=out)


def kth_smallest(groups: Sequence[Ranked], collectives: Collectives) -> list[Kth]:
    """Find the k-th smallest of each group; 1 <= k <= total.

    Args:
        groups: the same on all ranks, but for the shards.
        collectives: the group of ranks over which the values are spread.
    """
    digits = Digits.of(len(groups))
    brackets = _brackets(groups, digits, collectives)
    room = _room([shard for group in groups for shard in group.shards])
    asides = [
        _set_aside(group.shards, *bracket, room, len(groups))
        for group, bracket in zip(groups, brackets, strict=True)
    ]
    sums = collectives.sum(
        [n for aside in asides for n in (aside.below, aside.between, aside.lost)]
    )
    by_shard: list[Sequence[Iterable[Tensor]]] = []
    searches: list[_Search] = []
    for i, (group, aside, (low, high)) in enumerate(zip(groups, asides, brackets, strict=True)):
        below, between, lost = sums[3 * i : 3 * i + 3]
        if lost or not below < group.k <= below + between:
            by_shard.append([_Patterns([shard]) for shard in group.shards])
            searches.append(_Search(_Patterns(group.shards), group.k, 0, 31))
            continue
        parts = [_between(part, low, high) for part in aside.parts]
        by_shard.append([[part] for part in parts])
        joined = torch.cat(parts or [_no_patterns()])
        searches.append(_Search([joined], group.k - below, low, (high - low).bit_length()))
    _finish(searches, digits, collectives)
    return [
        Kth(bits=s.low, place=s.k, num_equal=s.size, by_shard=patterns)
        for s, patterns in zip(searches, by_shard, strict=True)
    ]


@dataclass(frozen=True)
class _Patterns:
    """All patterns of some shards, chunk by chunk."""

    shards: Sequence[Shard]

    def __iter__(self) -> Iterator[Tensor]:
        return (magnitude_bits(chunk) for shard in self.shards for chunk in shard.chunks())


def _no_patterns() -> Tensor:
    return torch.empty(0, dtype=torch.int32)


def _brackets(
    groups: Sequence[Ranked], digits: Digits, collectives: Collectives
) -> list[tuple[int, int]]:
    """Return patterns between which, both included, each group's k-th lies, going by a sample."""
    samples = [_sample(group, len(groups)) for group in groups]
    shift = 31 - digits.upper
    upper = _counts(
        [[sample >> shift] for sample in samples], [1 << digits.upper] * len(groups), collectives
    )
    ends, targets, rests = [], [], []
    for group, sample, counts in zip(groups, samples, upper, strict=True):
        size = int(counts.sum())
        place, share = group.k / group.total * size, group.k / group.total
        margin = _SIGMAS * math.sqrt(place * (1 - share)) + 1
        places = [min(max(int(place + d), 1), size) for d in (-margin, margin + 1)]
        ends.append(places[1] == size)
        # Both bins are counted once more by what is left of the patterns, in one reduction.
        for p in places:
            index, p_there, _ = _bin_holding(p, counts)
            first = index << shift
            targets.append((first, p_there))
            inside = _between(sample, first, first + (1 << shift) - 1)
            rests.append([inside - first >> shift - digits.digit])
    fine = _counts(rests, [1 << digits.digit] * len(rests), collectives)
    width = 1 << shift - digits.digit
    begins = [
        first + _bin_holding(p, counts)[0] * width
        for (first, p), counts in zip(targets, fine, strict=True)
    ]
    return [
        (low, GREATEST if at_end else high + width - 1)
        for low, high, at_end in zip(begins[::2], begins[1::2], ends, strict=True)
    ]


def _sample(group: Ranked, num_groups: int) -> Tensor:
    """Return the patterns of every stride-th value of a group."""
    least = max(_LEAST_SAMPLE // num_groups, _LEAST_SAMPLE // 4)
    most = max(_MOST_SAMPLE // num_groups, _LEAST_SAMPLE)
    stride = max(group.total // min(max(group.total // 32, least), most), 1)
    while any(stride % prime == 0 for prime in _AVOIDED):
        stride += 1
    sampled = [magnitude_bits(shard.weight[::stride].contiguous()) for shard in group.shards]
    return torch.cat(sampled or [_no_patterns()])


def _counts(
    digits: Sequence[Iterable[Tensor]], sizes: Sequence[int], collectives: Collectives
) -> tuple[Tensor, ...]:
    """Count the digits of each group, below its size, summed over the ranks."""
    counts = torch.zeros(sum(sizes), dtype=torch.int64, device=collectives.device)
    for part, chunks in zip(counts.split(list(sizes)), digits, strict=True):
        for chunk in chunks:
            part.add_(torch.bincount(chunk, minlength=part.numel()).to(part.device))
    collectives.all_reduce(counts)
    return tuple(torch.split(counts.cpu(), list(sizes)))


@dataclass(kw_only=True)
class _Aside:
    """How many patterns lie below and in a bracket, and by shard those in it with some others."""

    below: int = 0
    between: int = 0
    parts: list[Tensor]
    lost: bool = False


def _room(shards: Sequence[Shard]) -> Tensor:
    """Return the buffer that patterns are looked at in."""
    longest = min(_SPAN, max((shard.numel for shard in shards), default=0))
    device = shards[0].flat.device if shards else None
    return torch.empty(2, longest, dtype=torch.int32, device=device)


def _set_aside(
    shards: Sequence[Shard], low: int, high: int, room: Tensor, num_groups: int
) -> _Aside:
    """Count this rank's patterns below `low` and those from there to `high`, and keep the latter.

    They are lost where they are too many to be worth their memory.
    """
    below = between = 0
    aside = _Aside(parts=[])
    most = max(sum(shard.numel for shard in shards) // _MOST_ASIDE, CHUNK // num_groups)
    for shard in shards:
        parts = [room[0, :0].clone()]
        for chunk in shard.weight.split(_SPAN):
            # _TOGETHER at a time, far apart, are looked at as one: few columns then hold any that is
            # wanted. Comparisons written as int32 are four times faster than as bool, on AVX2.
            width = chunk.numel() // _TOGETHER
            bits, marks = room[:, : chunk.numel()]
            magnitude_bits(chunk, out=bits)
            rows, marked = (t[: _TOGETHER * width].view(_TOGETHER, width) for t in (bits, marks))
            num_below = torch.lt(rows, low, out=marked).sum(dim=0, dtype=torch.int32)
            wanted = torch.le(rows, high, out=marked).sum(dim=0, dtype=torch.int32).sub_(num_below)
            below += int(num_below.sum(dtype=torch.int32))
            between += int(wanted.sum(dtype=torch.int32))
            if between <= most:
                parts.append(rows.index_select(1, wanted.nonzero().squeeze(1)).view(-1))
            if rows.numel() < chunk.numel():
                rest = bits[rows.numel() :]
                below += int((rest < low).sum())
                between += int(((rest >= low) & (rest <= high)).sum())
                parts.append(rest.clone())
        aside.parts.append(torch.cat(parts))
    aside.below, aside.between, aside.lost = below, between, between > most
    if aside.lost:
        aside.parts.clear()
    return aside


@dataclass
class _Search:
    """A k-th smallest under way: it lies among `patterns`, from `low` on, in its last `width` bits.

    A list of patterns is narrowed as digits are found; other iterables, which must allow several passes,
    are read again. At the end `low` is the pattern, `k` its place among its equals, `size` their number.
    """

    patterns: Iterable[Tensor]
    k: int
    low: int
    width: int
    size: int = -1

    def narrow(self, counts: Tensor, shift: int) -> None:
        """Continue within the digit that the k-th has."""
        digit, self.k, self.size = _bin_holding(self.k, counts)
        self.low, self.width = self.low + (digit << shift), shift
        if shift:
            high = self.low + (1 << shift) - 1
            if isinstance(self.patterns, list):
                self.patterns = [_between(chunk, self.low, high) for chunk in self.patterns]
            else:
                self.patterns = _Narrowed(self.patterns, self.low, high)


def _finish(searches: Sequence[_Search], digits: Digits, collectives: Collectives) -> None:
    """Take all searches to their ends, digit by digit, with one reduction for all."""
    while under_way := [search for search in searches if search.size < 0 or search.width]:
        shifts = [max(search.width - digits.digit, 0) for search in under_way]
        counts = _counts(
            [_digits(s.patterns, s.low, shift) for s, shift in zip(under_way, shifts, strict=True)],
            [1 << s.width - shift for s, shift in zip(under_way, shifts, strict=True)],
            collectives,
        )
        for search, shift, counted in zip(under_way, shifts, counts, strict=True):
            search.narrow(counted, shift)


def _digits(patterns: Iterable[Tensor], low: int, shift: int) -> Iterator[Tensor]:
    return ((chunk - low).bitwise_right_shift_(shift) for chunk in patterns)


@dataclass(frozen=True)
class _Narrowed:
    """Patterns from `low` to `high` of an iterable too large to be kept."""

    patterns: Iterable[Tensor]
    low: int
    high: int

    def __iter__(self) -> Iterator[Tensor]:
        return (_between(chunk, self.low, self.high) for chunk in self.patterns)


def _between(patterns: Tensor, low: int, high: int) -> Tensor:
    return patterns[(patterns >= low) & (patterns <= high)]


def _bin_holding(k: int, counts: Tensor) -> tuple[int, int, int]:
    """Return the bin in which the k-th item lies, its 1-based place there, and the bin's size."""
    ends = counts.cumsum(0)
    index = int(torch.searchsorted(ends, k))
    size = int(counts[index])
    return index, k - (int(ends[index]) - size), size
