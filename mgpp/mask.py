"""Masks as packed bits: one bit a weight, little-endian within a byte, 1 = kept."""

from functools import cache

import torch
from torch import Tensor


def num_bytes(numel: int) -> int:
    """Bytes that `numel` packed bits take."""
    return (numel + 7) // 8


def pack_bits(keep: Tensor) -> Tensor:
    """Pack a 1-D bool tensor of n elements into uint8 of ceil(n / 8); spare bits are 0."""
    _check(keep, torch.bool)
    padded = torch.zeros(num_bytes(keep.numel()) * 8, dtype=torch.uint8, device=keep.device)
    padded[: keep.numel()] = keep
    return (padded.view(-1, 8) << _shifts(keep.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Unpack the first `numel` bits of a 1-D uint8 tensor into bool."""
    _check(packed, torch.uint8)
    if num_bytes(numel) != packed.numel():
        raise ValueError(f"{numel} bits take {num_bytes(numel)} bytes, got {packed.numel()} bytes")
    return _table(packed.device)[packed.to(torch.int32)].view(-1)[:numel]


def count_bits(packed: Tensor) -> int:
    """Count the bits set in a 1-D uint8 tensor."""
    _check(packed, torch.uint8)
    counts = torch.bincount(packed, minlength=256)
    return int((counts * _table(packed.device).sum(dim=1)).sum())


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
def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


@cache
def _table(device: torch.device) -> Tensor:
    """The eight bits of every byte value: looking a byte up is several times faster than shifting."""
    values = torch.arange(256, dtype=torch.uint8, device=device)
    return (values.unsqueeze(1) >> _shifts(device) & 1).to(torch.bool)
