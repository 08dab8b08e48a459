"""A tensor with many zeros as the other values, and bytes that say where those stand.

Where they stand is written in the way that is smaller for the tensor:

    bitmask   one bit an element, in row-major order, little-endian within a byte: 1 = a value
    gaps      one byte a value: the zeros before it. 255 with a value of zero stands for 256 zeros, so
              that a longer gap takes further entries; the last entry is the last element, zero or not

The first takes 1/8 byte an element, whatever the sparsity; the second one byte a value, and is smaller
above about 87.5%. An element is zero if all its bits are: -0.0 and NaN are values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mgpp.sharding.bitmask import count_bits, num_bytes, pack_bits, unpack_bits

Encoding = Literal["bitmask", "gaps"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 22  # elements at a time: a multiple of 8
_LONGEST = 256  # zeros that one entry of value zero stands for


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor is packed.

    Attributes:
        encoding: of the positions.
        num_values: values that are kept, further entries of long gaps among them.
        num_positions: bytes that say where they stand.
    """

    encoding: Encoding
    num_values: int
    num_positions: int

    def num_bytes(self, itemsize: int) -> int:
        """Return the bytes of both, of values of so many bytes."""
        return self.num_values * itemsize + self.num_positions


def layout_of(tensor: Tensor) -> Layout:
    """Return the smaller of the ways to pack a tensor."""
    num_values = num_entries = 0
    for part, (before, _) in zip(_parts(tensor), _gaps(tensor), strict=True):
        num_values += int(_bits(part).count_nonzero())
        num_entries += len(before) + int((before // _LONGEST).sum())
    bits = Layout(
        encoding="bitmask", num_values=num_values, num_positions=num_bytes(tensor.numel())
    )
    gaps = Layout(encoding="gaps", num_values=num_entries, num_positions=num_entries)
    return min(bits, gaps, key=lambda layout: layout.num_bytes(tensor.itemsize))


def packed_values(tensor: Tensor, encoding: Encoding) -> Iterator[Tensor]:
    """Yield the values of a packed tensor, 1-D and of its dtype, part by part."""
    if encoding == "bitmask":
        yield from (part[_bits(part) != 0] for part in _parts(tensor))
        return
    for part, (before, found) in zip(_parts(tensor), _gaps(tensor), strict=True):
        if len(found):
            ends = _entries(before)
            values = part.new_zeros(int(ends[-1]) + 1)
            _bits(values)[ends] = _bits(part)[found]
            yield values


def packed_positions(tensor: Tensor, encoding: Encoding) -> Iterator[Tensor]:
    """Yield the positions of a packed tensor, 1-D uint8, part by part."""
    if encoding == "bitmask":
        yield from (pack_bits(_bits(part) != 0) for part in _parts(tensor))
        return
    for before, found in _gaps(tensor):
        if len(found):
            ends = _entries(before)
            gaps = torch.full((int(ends[-1]) + 1,), _LONGEST - 1, dtype=torch.uint8)
            gaps[ends] = (before % _LONGEST).to(torch.uint8)
            yield gaps


def pack(tensor: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Return a tensor's values (1-D, of its dtype) and their positions (1-D uint8)."""
    nothing = tensor.new_empty(0), torch.empty(0, dtype=torch.uint8)
    return (
        torch.cat([nothing[0], *packed_values(tensor, encoding)]),
        torch.cat([nothing[1], *packed_positions(tensor, encoding)]),
    )


def unpack(values: Tensor, positions: Tensor, encoding: Encoding, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of a shape that was packed.

    Args:
        values: 1-D.
        positions: 1-D uint8.
        encoding: of the positions.
        shape: of the tensor.

    Raises:
        ValueError: if values, positions and shape do not belong together.
    """
    tensor = values.new_zeros(shape)
    flat, values = _bits(tensor.view(-1)), _bits(values)
    if encoding == "bitmask":
        _check_bitmask(values, positions, len(flat))
        used = 0
        for begin in range(0, len(flat), _PART):
            part = flat[begin : begin + _PART]
            packed = positions[begin // 8 : num_bytes(begin + len(part))]
            keep = unpack_bits(packed, len(part))
            count = int(keep.sum())
            part[keep] = values[used : used + count]
            used += count
        return tensor
    if len(values) != len(positions):
        raise ValueError(f"{len(values)} values have {len(positions)} gaps")
    at = -1
    for begin in range(0, len(values), _PART):
        steps = positions[begin : begin + _PART].to(torch.int64).add_(1)
        places = steps.cumsum(0).add_(at)
        at = int(places[-1])
        if at >= len(flat):
            raise ValueError(f"gaps lead beyond the {len(flat)} elements of {list(shape)}")
        flat[places] = values[begin : begin + _PART]
    if at != len(flat) - 1:
        raise ValueError(f"gaps lead to {at + 1} of the {len(flat)} elements of {list(shape)}")
    return tensor


def _check_bitmask(values: Tensor, positions: Tensor, numel: int) -> None:
    if len(positions) != num_bytes(numel):
        raise ValueError(f"a bitmask of {len(positions)} bytes for {numel} elements")
    if numel % 8 and int(positions[-1]) >> numel % 8:
        raise ValueError(f"a bitmask with bits beyond its {numel} elements")
    if count_bits(positions) != len(values):
        raise ValueError(
            f"a bitmask of {count_bits(positions)} values, of which there are {len(values)}"
        )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.reshape(-1).split(_PART))


def _bits(values: Tensor) -> Tensor:
    return values.view(_INTEGERS[values.itemsize])


def _gaps(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield of each part the zeros before each entry, and the entries' places in it: int64."""
    last, left = -1, tensor.numel()  # `last`: place of the entry before, from the part's begin
    for part in _parts(tensor):
        found = _bits(part).nonzero().squeeze(1)
        left -= len(part)
        if not left and len(part) and not _bits(part)[-1:].any():
            found = torch.cat([found, found.new_tensor([len(part) - 1])])
        before = found.diff(prepend=found.new_tensor([last])) - 1
        last = (int(found[-1]) if len(found) else last) - len(part)
        yield before, found


def _entries(before: Tensor) -> Tensor:
    """Return which entry each value is, after those of long gaps."""
    return (before // _LONGEST).add_(1).cumsum(0).sub_(1)
