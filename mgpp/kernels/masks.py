"""The operators of `mgpp.sharding.masks` on a GPU, in Triton: each one launch over all tensors.

Triton comes with torch's builds for GPUs; this module is imported only where there is one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpp.kernels.tables import addresses, launch, whole_blocks

_BYTES = 1024  # of a mask, that a program has
_MIX = (-0x61C8864680B583EB, -0x4B47D0C1A1E98BB9)  # as in `mgpp.sharding.stats`


@triton.jit
def _range(blocks):  # type: ignore[no-untyped-def]
    """Return which tensor is this program's, its first element and its end."""
    row = blocks + tl.program_id(0) * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit  # type: ignore[untyped-decorator]
def _zero_pruned(  # type: ignore[no-untyped-def]
    blocks,
    weights,
    masks,
    BYTES: tl.constexpr,  # noqa: N803
):
    which, begin, end = _range(blocks)
    weight = tl.load(weights + which).to(tl.pointer_type(tl.float32))
    mask = tl.load(masks + which).to(tl.pointer_type(tl.uint8))
    at = begin + tl.arange(0, BYTES * 8)
    bits = tl.load(mask + at // 8, mask=at < end, other=0xFF).to(tl.int32)
    pruned = ((bits >> (at % 8).to(tl.int32)) & 1) == 0
    tl.store(weight + at, tl.zeros([BYTES * 8], dtype=tl.float32), mask=pruned & (at < end))


def zero_pruned_(weights: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
    """As `mgpp.sharding.masks.zero_pruned_`."""
    blocks = whole_blocks([len(w) for w in weights], _BYTES * 8, weights[0].device)
    launch(_zero_pruned, blocks, addresses(weights), addresses(keep), BYTES=_BYTES)


@triton.jit  # type: ignore[untyped-decorator]
def _keep_above(  # type: ignore[no-untyped-def]
    blocks,
    pointers,
    masks,
    places,
    cuts,
    tied_until,
    BYTES: tl.constexpr,  # noqa: N803
):
    which, begin, end = _range(blocks)
    patterns = tl.load(pointers + which).to(tl.pointer_type(tl.int32))
    mask = tl.load(masks + which).to(tl.pointer_type(tl.uint8))
    place = places + which * 3
    first, offset, size = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    byte = tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    at = begin + byte[:, None] * 8 + bit[None, :]
    inside = at < end
    matrix = first + (offset + at) // size
    cut = tl.load(cuts + matrix, mask=inside, other=0)
    until = tl.load(tied_until + matrix, mask=inside, other=0)
    bits = tl.load(patterns + at, mask=inside, other=0) & 0x7FFFFFFF
    kept = inside & ((bits > cut) | ((bits == cut) & (at >= until)))
    packed = tl.sum(kept.to(tl.int32) << bit[None, :], axis=1)
    tl.store(mask + begin // 8 + byte, packed.to(tl.uint8), mask=begin + byte * 8 < end)


def keep_above(
    values: Sequence[Tensor], places: Sequence[int], cuts: Tensor, tied_until: Tensor
) -> list[Tensor]:
    """As `mgpp.sharding.masks.keep_above`."""
    packed = [v.new_empty((len(v) + 7) // 8, dtype=torch.uint8) for v in values]
    blocks = whole_blocks([len(v) for v in values], _BYTES * 8, cuts.device)
    layout = torch.tensor(places).to(cuts.device, non_blocking=True)
    launch(
        _keep_above,
        blocks,
        addresses(values),
        addresses(packed),
        layout,
        cuts,
        tied_until,
        BYTES=_BYTES,
    )
    return packed


@triton.jit  # type: ignore[untyped-decorator]
def _factor(number, MIX0: tl.constexpr, MIX1: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    mixed = (number + 1) * MIX0
    mixed = (mixed ^ (mixed >> 31)) * MIX1
    return (mixed ^ (mixed >> 29)) | 1


@triton.jit
def _num_set(byte):  # type: ignore[no-untyped-def]
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


@triton.jit  # type: ignore[untyped-decorator]
def _compare_masks(  # type: ignore[no-untyped-def]
    blocks,
    masks,
    others,
    firsts,
    found,
    num_masks,
    MIX0: tl.constexpr,  # noqa: N803
    MIX1: tl.constexpr,  # noqa: N803
    BYTES: tl.constexpr,  # noqa: N803
):
    which, begin, end = _range(blocks)
    at = begin // 8 + tl.arange(0, BYTES)
    inside = at * 8 < end
    mask = tl.load(masks + which).to(tl.pointer_type(tl.uint8))
    other = tl.load(others + which).to(tl.pointer_type(tl.uint8))
    keep = tl.load(mask + at, mask=inside, other=0).to(tl.int64)
    before = tl.load(other + at, mask=inside, other=0).to(tl.int64)
    spare = tl.minimum(tl.maximum((at + 1) * 8 - end, 0), 8)  # bits that belong to no weight
    first = tl.load(firsts + which)
    pruned = (keep ^ (0xFF >> spare)) << (first % 8)
    number = first // 8 + at
    low = (pruned & 0xFF) * _factor(number, MIX0, MIX1)
    high = (pruned >> 8) * _factor(number + 1, MIX0, MIX1)
    tl.atomic_add(found + which, tl.sum(tl.where(inside, low + high, 0), axis=0))
    tl.atomic_add(found + num_masks + which, tl.sum(_num_set(keep), axis=0))
    tl.atomic_add(found + 2 * num_masks + which, tl.sum(_num_set(before), axis=0))
    churned = before & (keep ^ 0xFF)
    tl.atomic_add(found + 3 * num_masks + which, tl.sum(_num_set(churned), axis=0))


def compare_masks(
    keep: Sequence[Tensor], before: Sequence[Tensor], numels: Sequence[int], firsts: Sequence[int]
) -> Tensor:
    """As `mgpp.sharding.masks.compare_masks`."""
    device = keep[0].device
    found = torch.zeros(4, len(keep), dtype=torch.int64, device=device)
    blocks = whole_blocks(numels, _BYTES * 8, device)
    begins = torch.tensor(firsts).to(device, non_blocking=True)
    launch(
        _compare_masks,
        blocks,
        addresses(keep),
        addresses(before),
        begins,
        found,
        len(keep),
        MIX0=_MIX[0],
        MIX1=_MIX[1],
        BYTES=_BYTES,
    )
    return found
