"""Safetensors files written front to back, a tensor or a part of one at a time, and where tensors lie.

The format: https://github.com/huggingface/safetensors#format. `safetensors.torch.save_file` needs all
tensors in memory at once; this needs their dtypes and shapes first, then one after another.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
HEADER_START = 8  # bytes of the number that says how long the header is


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies in a file.

    Attributes:
        dtype: of its values.
        shape: of the tensor.
        begin: where its first byte lies in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def bytes_of(self, first: int, last: int) -> tuple[int, int]:
        """Return where values `first` to `last` (exclusive) of the flattened tensor lie in the file."""
        width = self.dtype.itemsize
        return self.begin + first * width, self.begin + last * width


def header_end(start: bytes) -> int:
    """Return where a file's header ends, given its first `HEADER_START` bytes."""
    return HEADER_START + int.from_bytes(start[:HEADER_START], "little")


def places(header: bytes) -> dict[str, TensorPlace]:
    """Return where a file's tensors lie, given all bytes up to `header_end`."""
    entries = json.loads(header[HEADER_START:])
    return {
        name: TensorPlace(
            dtype=_BY_NAME[entry["dtype"]],
            shape=tuple(entry["shape"]),
            begin=len(header) + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


class Stream(Protocol):
    """What bytes are written to: an open file, a file of fsspec."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take all of the bytes."""


class TensorFile:
    """A safetensors file that is being written.

    Args:
        stream: where to. The caller opens and closes it.
        tensors: dtype and shape by name, in the order in which their values come.
        metadata: kept in the header under `__metadata__`.

    Attributes:
        order: the names as their values must come: the widest dtype first, so that all values are
            aligned in the file, then as they were given.

    Raises:
        ValueError: if a dtype has no name in the format.
    """

    def __init__(
        self,
        stream: Stream,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        for name, (dtype, _) in tensors.items():
            if dtype not in _DTYPES:
                raise ValueError(f"{name}: safetensors has no {dtype}")
        self.order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
        self._stream, self._tensors = stream, dict(tensors)
        self._left = {name: prod(shape) for name, (_, shape) in tensors.items()}
        self._at = 0
        stream.write(self._header(metadata))

    def write(self, name: str, values: Tensor) -> None:
        """Append values of a tensor: all of them, or the next in row-major order.

        Raises:
            ValueError: if another tensor's values come next, or these are of another dtype or too many.
        """
        self._pass_empty()
        due = self.order[self._at] if self._at < len(self.order) else None
        if values.numel() == 0 and name in self._tensors:
            return
        if name != due:
            raise ValueError(f"values of {name} where those of {due} come next")
        if values.dtype != self._tensors[name][0]:
            raise ValueError(f"{name} is {self._tensors[name][0]}, not {values.dtype}")
        if values.numel() > self._left[name]:
            raise ValueError(f"{name} has {self._left[name]} values left, not {values.numel()}")
        flat = values.detach().cpu().contiguous().reshape(-1)
        self._stream.write(flat.view(torch.uint8).numpy().data)
        self._left[name] -= values.numel()

    def finish(self) -> None:
        """Check that everything was written.

        Raises:
            ValueError: naming the first tensor that is not whole.
        """
        self._pass_empty()
        if self._at < len(self.order):
            name = self.order[self._at]
            raise ValueError(f"{name} is not whole: {self._left[name]} values are missing")

    def _header(self, metadata: Mapping[str, str] | None) -> bytes:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name in self.order:
            dtype, shape = self._tensors[name]
            end = offset + prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _pass_empty(self) -> None:
        while self._at < len(self.order) and self._left[self.order[self._at]] == 0:
            self._at += 1


def write_tensors(stream: Stream, tensors: Mapping[str, Tensor], part_bytes: int = 8 << 20) -> None:
    """Write tensors of any device as a safetensors file, a part at a time.

    Raises:
        ValueError: if a dtype has no name in the format.
    """
    file = TensorFile(stream, {name: (t.dtype, t.shape) for name, t in tensors.items()})
    for name in file.order:
        flat = tensors[name].detach().reshape(-1)
        for part in flat.split(max(part_bytes // flat.itemsize, 1)):
            file.write(name, part)
    file.finish()
