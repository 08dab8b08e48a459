"""N:M: within every group of M, only the M - N lowest scored may be pruned."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mgpp.kernels.devices import chunk_size
from mgpp.pattern import NofM, Tiling
from mgpp.sharding.counting import GREATEST, magnitude_bits
from mgpp.sharding.shards import Shard
from mgpp.sharding.spans import Span, Straddling


def eligible_shards(
    scored: Sequence[Shard], pattern: NofM, tilings: Sequence[Tiling], straddling: Straddling
) -> list[Shard]:
    """Return shards of the same scores in which those that must stay are above all numbers.

    Groups that lie on several ranks are put together by one reduction of their bit patterns. Takes four
    bytes a weight.

    Args:
        scored: this rank's shards of scores; all ranks must call.
        pattern: N and M.
        tilings: by `Shard.index`.
        straddling: the spans that are cut.
    """
    bits = [magnitude_bits(shard.weight) for shard in scored]
    parts: dict[Span, Tensor] = {}
    for shard, values in zip(scored, bits, strict=True):
        span = tilings[shard.index].span
        for key in straddling.of(shard, span):
            whole = values.new_zeros(span)
            here, there = _overlap(shard, key[1], span)
            whole[there] = values[here]
            parts[key] = whole
    joined = straddling.sum(parts, [tiling.span for tiling in tilings], torch.int32)
    for shard, values in zip(scored, bits, strict=True):
        tiling = tilings[shard.index]
        begin = -shard.offset % tiling.span
        end = shard.numel - (shard.offset + shard.numel) % tiling.span
        if begin < end:
            _hold_back_(values[begin:end], tiling, pattern)
        for key in straddling.of(shard, tiling.span):
            whole = joined[key].to(values.device, copy=True)
            _hold_back_(whole, tiling, pattern)
            here, there = _overlap(shard, key[1], tiling.span)
            values[here] = whole[there]
    return [
        replace(shard, flat=values.view(torch.float32), start=0)
        for shard, values in zip(scored, bits, strict=True)
    ]


def _overlap(shard: Shard, number: int, span: int) -> tuple[slice, slice]:
    """Return the part of a span that a shard holds: as a range of the shard, and of the span."""
    first = number * span
    begin, end = max(shard.offset, first), min(shard.offset + shard.numel, first + span)
    return (
        slice(begin - shard.offset, end - shard.offset),
        slice(begin - first, end - first),
    )


def _hold_back_(bits: Tensor, tiling: Tiling, pattern: NofM) -> None:
    """Raise to GREATEST, in whole spans, all but the M - N lowest of each group; of equals the last."""
    spans = bits.view(-1, pattern.of, tiling.width)
    for part in spans.split(max(chunk_size(bits.device) // tiling.span, 1)):
        turned = part.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        members = turned.view(pattern.of, -1)  # a row for each place in the groups
        place = torch.zeros(members.shape, dtype=torch.int16, device=bits.device)
        for i in range(pattern.of):
            for j in range(i + 1, pattern.of):
                earlier = members[i] <= members[j]
                place[j] += earlier
                place[i] += ~earlier
        members.masked_fill_(place >= pattern.of - pattern.kept, GREATEST)
        part.copy_(turned.transpose(0, 1))
