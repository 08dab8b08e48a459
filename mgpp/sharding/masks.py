"""Masks of many shards at once: operators, each one operation however many shards there are.

On a CPU they are plain torch, chunk by chunk; on GPUs kernels of `mgpp.kernels.masks`. Masks are packed
as in `bitmask`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mgpp.kernels.devices import bit_chunks, chunk_size, chunks
from mgpp.kernels.operators import operator
from mgpp.sharding.bitmask import count_bits, num_bytes, pack_bits, unpack_bits
from mgpp.sharding.counting import magnitude_bits
from mgpp.sharding.stacks import runs
from mgpp.sharding.stats import positions_hash


@operator("masks", fake=lambda weights, keep: None, mutates=("weights",))
def zero_pruned_(weights: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
    """Set to +0.0, in place, the weights that are not kept.

    Args:
        weights: 1-D float32; changed in place.
        keep: the mask of each, packed.
    """
    for weight, packed in zip(weights, keep, strict=True):
        for chunk, bits in zip(chunks(weight), bit_chunks(packed), strict=True):
            # A product of integers takes any pattern as it is and leaves no -0.0; it is ten times faster
            # than `masked_fill_` (AVX2).
            chunk.view(torch.int32).mul_(unpack_bits(bits, chunk.numel()).to(torch.int32))


@operator(
    "masks",
    fake=lambda values, places, cuts, tied_until: [
        value.new_empty(num_bytes(len(value)), dtype=torch.uint8) for value in values
    ],
)
def keep_above(
    values: Sequence[Tensor], places: Sequence[int], cuts: Tensor, tied_until: Tensor
) -> list[Tensor]:
    """Return the packed masks of what lies above its matrix's cut; of what equals it, from a place on.

    Args:
        values: as in `Stacks`, what is kept or not by magnitude.
        places: likewise.
        cuts: int32, by matrix: the bit pattern of a magnitude.
        tied_until: int64, by matrix: the first element of the range, if it equals the cut, that is kept.
    """
    keys = list(zip(cuts.tolist(), tied_until.tolist(), strict=True))
    packed = [torch.empty(num_bytes(len(v)), dtype=torch.uint8, device=v.device) for v in values]
    parts: list[list[tuple[int, int, int, bool]]] = [[] for _ in values]
    for which, begin, end, (cut, until) in runs(values, places, keys):
        middle = min(max(begin, until), end)
        parts[which] += [(begin, middle, cut, False), (middle, end, cut, True)]
    for value, bits, ranges in zip(values, packed, parts, strict=True):
        size = chunk_size(value.device)
        for start, into in zip(range(0, len(value), size), bit_chunks(bits), strict=False):
            into.copy_(pack_bits(_kept(value[start : start + size], start, ranges)))
    return packed


def _kept(values: Tensor, start: int, ranges: Sequence[tuple[int, int, int, bool]]) -> Tensor:
    """Return which of some values, from element `start` of a range on, stay: bool."""
    patterns = magnitude_bits(values)
    for begin, end, cut, with_equal in ranges:
        part = patterns[max(begin - start, 0) : max(end - start, 0)]
        # Written as int32 comparisons are four times faster than as bool (AVX2).
        (torch.ge if with_equal else torch.gt)(part, cut, out=part)
    return patterns.to(torch.bool)


@operator(
    "masks",
    fake=lambda keep, before, numels, firsts: keep[0].new_empty(4, len(keep), dtype=torch.int64),
)
def compare_masks(
    keep: Sequence[Tensor], before: Sequence[Tensor], numels: Sequence[int], firsts: Sequence[int]
) -> Tensor:
    """Hash masks, and count what they keep and what other ones of the same weights did.

    The bits are taken as bytes of the whole model's mask, each with a random 64-bit factor, and what is
    pruned is summed modulo 2^64: linear in every bit, so the hashes of parts add up to that of the whole
    however it was cut, also in the middle of a byte.

    Args:
        keep: packed masks.
        before: others of the same sizes.
        numels: elements of each.
        firsts: the place of each one's first element among those of all weights.

    Returns:
        int64 [4, masks]: the hash, how many `keep` keeps, how many `before` does, how many only `before`.
    """
    found = [
        [positions_hash(new, numel, first), *map(count_bits, (new, old, old & ~new))]
        for new, old, numel, first in zip(keep, before, numels, firsts, strict=True)
    ]
    return torch.tensor(found, dtype=torch.int64, device=keep[0].device).t().contiguous()
