"""Masks as packed bits: one bit a weight, little-endian within a byte, 1 = kept."""

import sys
from functools import cache

import torch
from torch import Tensor

assert sys.byteorder == "little", "packing takes the bytes of an integer in little-endian order"

_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


def num_bytes(numel: int) -> int:
    """Bytes that `numel` packed bits take."""
    return (numel + 7) // 8


def pack_bits(keep: Tensor) -> Tensor:
    """Pack a 1-D bool tensor of n elements into uint8 of ceil(n / 8); spare bits are 0."""
    _check(keep, torch.bool)
    if keep.numel() % 8 or keep.storage_offset() % 8:
        padded = torch.zeros(num_bytes(keep.numel()) * 8, dtype=torch.bool, device=keep.device)
        padded[: keep.numel()] = keep
        keep = padded
    # Eight bools are the bytes of one integer; the product moves bit i of them to bit 56 + i.
    return (keep.view(torch.int64) * _GATHER).view(torch.uint8)[7::8].contiguous()


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Unpack the first `numel` bits of a 1-D uint8 tensor into bool."""
    _check(packed, torch.uint8)
    if num_bytes(numel) != packed.numel():
        raise ValueError(f"{numel} bits take {num_bytes(numel)} bytes, got {packed.numel()} bytes")
    # Looking a byte's eight bools up, as one integer, is several times faster than shifting.
    looked_up = _table(packed.device).index_select(0, packed.to(torch.int32))
    return looked_up.view(torch.bool)[:numel]


def slice_bits(packed: Tensor, start: int, numel: int) -> Tensor:
    """Return `numel` packed bits from `start` on, packed; a view where both are whole bytes."""
    shift = start % 8
    held = packed[start // 8 : num_bytes(start + numel)]
    if not shift and not numel % 8:
        return held
    return pack_bits(unpack_bits(held, held.numel() * 8)[shift : shift + numel])


def count_bits(packed: Tensor) -> int:
    """Count the bits set in a 1-D uint8 tensor."""
    _check(packed, torch.uint8)
    counts = torch.bincount(packed, minlength=256)
    return int((counts * _table(packed.device).view(torch.uint8).view(-1, 8).sum(dim=1)).sum())


def all_kept(numel: int, device: torch.device) -> Tensor:
    """Return the packed mask of `numel` weights that are all kept."""
    packed = torch.full((num_bytes(numel),), 0xFF, dtype=torch.uint8, device=device)
    if numel % 8:
        packed[-1] = (1 << numel % 8) - 1
    return packed


def _check(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dim() != 1 or tensor.dtype != dtype:
        raise ValueError(f"need a 1-D {dtype} tensor, got {tensor.dim()}-D {tensor.dtype}")


@cache
def _table(device: torch.device) -> Tensor:
    """The eight bits of every byte value, as the bytes of one int64."""
    values = torch.arange(256, dtype=torch.uint8, device=device)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return (values.unsqueeze(1) >> shifts & 1).view(torch.int64).view(-1)
