"""The exact k-th smallest magnitude over all shards, and exactly which k weights go.

For non-negative float32 the order of values is the order of their bit patterns, so the k-th smallest
|w| needs no gathering and no sorting, only counting. A strided sample of a million weights tells two
patterns between which it lies almost surely; one pass over the weights counts those below and sets
those between aside, about one in a hundred; the k-th is then found among them by counting one digit of
the pattern after the other. Every count is summed over the ranks, so the result is the same bit for
bit on any number of them, and each sends some 700 KiB, whatever the model's size. Where the sample was
wrong, or too many weights are tied, the digits of all weights are counted instead.

Clearing the sign bit makes -0.0 equal 0.0.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.collectives import Collectives
from mgpp.shards import CHUNK, Shard

_MAGNITUDE = 0x7FFFFFFF
_LEAST_SAMPLE, _MOST_SAMPLE = 1 << 16, 1 << 20
_SAMPLE_SHIFT = 15  # the sample is counted by the upper 16 of 31 bits first
# A stride that shares a factor with a matrix's width would see few of its columns.
_AVOIDED = (2, 3, 5, 7, 11, 13)
_SIGMAS = 6.0  # neighbours are alike, so the sample's error exceeds the binomial one somewhat
_DIGIT_BITS = 12
_SPAN = 1 << 20
_TOGETHER = 8
_MOST_ASIDE = 16  # at most one weight in this many is set aside


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the k smallest magnitudes end.

    Attributes:
        k: how many weights go, over all ranks.
        bits: bit pattern of the k-th smallest magnitude; all patterns below it go.
        tied_quota: by position in this rank's list of shards, how many weights equal to the k-th
            magnitude go from it, first come first; None where all of them go, the usual case.
    """

    k: int
    bits: int
    tied_quota: tuple[int, ...] | None

    @property
    def threshold(self) -> float:
        """The k-th smallest magnitude (0 when k = 0)."""
        return float(torch.tensor(self.bits, dtype=torch.int32).view(torch.float32))


def magnitude_bits(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the bit pattern of |w| as int32, ordered as the magnitudes are; in `out` if given."""
    return torch.bitwise_and(weight.view(torch.int32), _MAGNITUDE, out=out)


def find_cut(
    shards: Sequence[Shard], k: int, full_numels: Sequence[int], collectives: Collectives
) -> Cut:
    """Find which k weights have the smallest magnitude over all shards of all ranks.

    Ties at the k-th value go in global order: by weight, then by position in it. That order does
    not depend on how the weights are sharded.

    Args:
        shards: this rank's shards.
        k: how many weights are to go, 0 <= k <= all prunable weights.
        full_numels: elements of each whole prunable weight (matrix), by `Shard.index`.
        collectives: the group over which the weights are sharded.

    Raises:
        ValueError: if k is negative or exceeds the number of weights there are.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    total = sum(full_numels)
    if k > total:
        raise ValueError(f"k = {k} exceeds the {total} weights there are")
    if k == 0:
        return Cut(k=0, bits=0, tied_quota=(0,) * len(shards))
    low, high = _bracket(shards, k, total, collectives)
    below, num_between, aside = _set_aside(shards, low, high)
    all_below, all_between, not_kept = collectives.sum([below, num_between, aside is None])
    if aside is not None and not not_kept and all_below < k <= all_below + all_between:
        aside = [_between(chunk, low, high) for chunk in aside]
        joined = torch.cat(aside or [_no_patterns()])
        found = _kth([joined], k - all_below, low, high, collectives)
    else:
        aside = None
        found = _kth(_Patterns(shards), k, 0, _MAGNITUDE, collectives)
    bits, num_tied, all_tied = found
    if num_tied == all_tied:
        return Cut(k=k, bits=bits, tied_quota=None)
    by_shard = [[chunk] for chunk in aside] if aside else [_Patterns([s]) for s in shards]
    num_equal = [sum(int((c == bits).sum()) for c in patterns) for patterns in by_shard]
    quota = _share_ties(shards, num_equal, num_tied, len(full_numels), collectives)
    return Cut(k=k, bits=bits, tied_quota=quota)


def sent_bytes(world_size: int, num_weights: int) -> int:
    """Return the most that a rank hands to reductions for one `find_cut`, in bytes.

    Args:
        world_size: ranks over which the weights are sharded.
        num_weights: number of prunable weights (matrices) over the whole model.
    """
    upper, digit = 1 << (31 - _SAMPLE_SHIFT), 1 << _DIGIT_BITS
    ties = num_weights + world_size
    return 8 * (upper + 2 * digit + 3 + 3 * digit + ties)


def kept_chunks(shards: Sequence[Shard], position: int, cut: Cut) -> Iterator[Tensor]:
    """Yield for each chunk of a shard an int32 tensor: 1 where weights stay and 0 where they go.

    Args:
        shards: the list given to `find_cut`.
        position: which shard of it.
        cut: the result of `find_cut`.
    """
    quota = 0 if cut.tied_quota is None else cut.tied_quota[position]
    for chunk in shards[position].chunks():
        bits = magnitude_bits(chunk)
        compare = torch.gt if cut.tied_quota is None else torch.ge
        keep = compare(bits, cut.bits, out=torch.empty_like(bits))
        if quota:
            tied = (bits == cut.bits).nonzero().squeeze(1)[:quota]
            keep[tied] = 0
            quota -= tied.numel()
        yield keep
    assert quota == 0, "the weights changed between the count and the cut"


@dataclass(frozen=True)
class _Patterns:
    """All patterns of some shards, chunk by chunk."""

    shards: Sequence[Shard]

    def __iter__(self) -> Iterator[Tensor]:
        return (magnitude_bits(chunk) for shard in self.shards for chunk in shard.chunks())


def _no_patterns() -> Tensor:
    return torch.empty(0, dtype=torch.int32)


def _bracket(
    shards: Sequence[Shard], k: int, total: int, collectives: Collectives
) -> tuple[int, int]:
    """Return patterns between which, both included, the k-th smallest lies, going by a sample."""
    stride = max(total // min(max(total // 32, _LEAST_SAMPLE), _MOST_SAMPLE), 1)
    while any(stride % prime == 0 for prime in _AVOIDED):
        stride += 1
    sampled = [magnitude_bits(shard.weight[::stride].contiguous()) for shard in shards]
    sample = torch.cat(sampled or [_no_patterns()])
    upper = _counts([sample >> _SAMPLE_SHIFT], 1 << (31 - _SAMPLE_SHIFT), collectives)
    size = int(upper.sum())
    place = k / total * size
    margin = _SIGMAS * math.sqrt(place * (1 - k / total)) + 1
    places = [min(max(int(place + d), 1), size) for d in (-margin, margin + 1)]
    bins = [_bin_holding(p, upper)[:2] for p in places]
    # Both bins are counted once more by what is left of the patterns, in one reduction.
    rests = [_between(sample, *_span(i)) & ((1 << _SAMPLE_SHIFT) - 1) for i, _ in bins]
    fine_bits = _SAMPLE_SHIFT - _DIGIT_BITS
    offset = 1 << _DIGIT_BITS
    fine = _counts(
        [rests[0] >> fine_bits, (rests[1] >> fine_bits) + offset], 2 * offset, collectives
    )
    (first, p), (last, q) = bins
    low = _span(first)[0] + (_bin_holding(p, fine[:offset])[0] << fine_bits)
    high = _span(last)[0] + (_bin_holding(q, fine[offset:])[0] + 1 << fine_bits) - 1
    return low, high if places[1] < size else _MAGNITUDE


def _span(index: int) -> tuple[int, int]:
    """Return the first and the last pattern of a bin of the sample's upper bits."""
    return index << _SAMPLE_SHIFT, (index + 1 << _SAMPLE_SHIFT) - 1


def _counts(digits: Iterable[Tensor], num_bins: int, collectives: Collectives) -> Tensor:
    """Count digits below `num_bins`, summed over the ranks."""
    counts = torch.zeros(num_bins, dtype=torch.int64, device=collectives.device)
    for chunk in digits:
        counts += torch.bincount(chunk, minlength=num_bins).to(counts.device)
    collectives.all_reduce(counts)
    return counts


def _set_aside(
    shards: Sequence[Shard], low: int, high: int
) -> tuple[int, int, list[Tensor] | None]:
    """Count this rank's patterns below `low` and those from there to `high`, and keep the latter.

    Returns:
        The two counts, and by shard a tensor with all patterns from `low` to `high` and some others;
        None instead where they are too many to be worth their memory.
    """
    below = between = 0
    aside: list[Tensor] = []
    most = max(sum(shard.numel for shard in shards) // _MOST_ASIDE, CHUNK)
    longest = min(_SPAN, max((shard.numel for shard in shards), default=0))
    for shard in shards:
        if not aside:
            room = torch.empty(2, longest, dtype=torch.int32, device=shard.flat.device)
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
        aside.append(torch.cat(parts))
    return below, between, aside if between <= most else None


def _kth(
    patterns: Iterable[Tensor], k: int, low: int, high: int, collectives: Collectives
) -> tuple[int, int, int]:
    """Find the k-th smallest of patterns, all from `low` to `high`, digit by digit.

    Args:
        patterns: 1-D int32 tensors; a list is narrowed as digits are found, other iterables, which must
            allow several passes, are read again.
        k: from 1 to the number of patterns of all ranks.
        low: no pattern is below.
        high: no pattern is above.
        collectives: the group over which the patterns are spread.

    Returns:
        The pattern, the place of the k-th among those equal to it (from 1), and how many those are.
    """
    width_bits = (high - low).bit_length()
    while True:
        shift = max(width_bits - _DIGIT_BITS, 0)
        num_bins = 1 << (width_bits - shift)
        digits = ((chunk - low).bitwise_right_shift_(shift) for chunk in patterns)
        counts = _counts(digits, num_bins, collectives)
        digit, k, size = _bin_holding(k, counts)
        low, width_bits = low + (digit << shift), shift
        if shift == 0:
            return low, k, size
        patterns = _narrowed(patterns, low, low + (1 << shift) - 1)


def _narrowed(patterns: Iterable[Tensor], low: int, high: int) -> Iterable[Tensor]:
    if isinstance(patterns, list):
        return [_between(chunk, low, high) for chunk in patterns]
    return _Narrowed(patterns, low, high)


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


def _share_ties(
    shards: Sequence[Shard],
    num_equal: Sequence[int],
    num_tied: int,
    num_weights: int,
    collectives: Collectives,
) -> tuple[int, ...]:
    """Divide the `num_tied` ties that go among the shards, which hold `num_equal`, in global order."""
    by_weight = [0] * num_weights
    for shard, count in zip(shards, num_equal, strict=True):
        by_weight[shard.index] += count
    totals = collectives.sum(by_weight)
    left, straddled, quotas = num_tied, -1, [0] * num_weights
    for index, total in enumerate(totals):
        quotas[index] = min(left, total)
        left -= quotas[index]
        if 0 < quotas[index] < total:
            straddled = index
    # Only one weight can be cut in two; there the ranks before this one take theirs first.
    mine = by_weight[straddled] if straddled >= 0 else 0
    before = sum(collectives.by_rank(mine)[: collectives.rank])
    result = []
    for shard, count in zip(shards, num_equal, strict=True):
        quota = quotas[shard.index]
        if shard.index == straddled:
            quota -= before
        result.append(min(max(quota, 0), count))
    return tuple(result)
