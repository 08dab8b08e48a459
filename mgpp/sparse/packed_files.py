"""Weight files written packed, tensor by tensor, from wherever they are read to wherever they go.

First all tensors are looked at, then the files are written front to back, for a file begins with what is
in it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from mgpp.sparse.packing import Encoding, Layout, layout_of, packed_positions, packed_values
from mgpp.sparse.reading import PackedError, unpacked
from mgpp.tensor_file import Stream, TensorFile

_LEAST_BYTES = 4096  # of a tensor: less is not worth two
_MOST_OF_PLAIN = 0.99

Progress = Callable[[int, int], None]
"""Called with the bytes that are done, and with all, of the plain weights."""


class TensorSource(Protocol):
    """The weight files of a plain checkpoint."""

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """The names of the tensors in each file."""

    def metadata(self, file: str) -> Mapping[str, str] | None:
        """Return what a file's header says beside its tensors."""

    def read(self, file: str, name: str) -> Tensor:
        """Return one tensor."""


class FileTarget(Protocol):
    """Where the packed files go."""

    def open(self, file: str) -> AbstractContextManager[Stream]:
        """Give a stream that is the file when the block ends."""

    def read(self, file: str, name: str) -> Tensor:
        """Return one tensor of a file that was written."""


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """What one packed file will hold.

    Attributes:
        tensors: dtype and shape by name, of values and positions, and of what is not packed.
        positions: by the name of such a tensor, the weight that it is of.
        entries: shape and encoding of each packed weight, by name.
        plain_bytes: of the plain tensors, by name.
    """

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    positions: dict[str, str]
    entries: dict[str, dict[str, Any]]
    plain_bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """What packed files will hold, by their names."""

    files: dict[str, PlannedFile]

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Shape and encoding of each packed weight, by name."""
        return {n: entry for file in self.files.values() for n, entry in file.entries.items()}

    @property
    def weight_map(self) -> dict[str, str]:
        """The file of each tensor."""
        return {name: file for file, planned in self.files.items() for name in planned.tensors}

    @property
    def weight_bytes(self) -> dict[str, int]:
        """The bytes of each weight as it is packed, by name."""
        found: dict[str, int] = {}
        for file in self.files.values():
            for name, (dtype, shape) in file.tensors.items():
                weight = file.positions.get(name, name)
                found[weight] = found.get(weight, 0) + prod(shape) * dtype.itemsize
        return found


def packed_layout(tensor: Tensor) -> Layout | None:
    """Return how a checkpoint's tensor is packed; None if it is stored as it is."""
    if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.nbytes < _LEAST_BYTES:
        return None
    layout = layout_of(tensor)
    return layout if layout.num_bytes(tensor.itemsize) <= _MOST_OF_PLAIN * tensor.nbytes else None


def plan_packing(source: TensorSource) -> PackingPlan:
    """Return what packed files of a checkpoint will hold; reads every tensor once.

    Raises:
        PackedError: if a name that packing needs is taken.
    """
    return PackingPlan(files={file: _planned(source, file) for file in source.files})


def unseen(done: int, total: int) -> None:
    """Show no progress."""


def write_packed_files(
    plan: PackingPlan, source: TensorSource, target: FileTarget, progress: Progress = unseen
) -> None:
    """Write packed files, read them back, and check that they unpack to the same bits.

    Args:
        plan: of the same source.
        source: read up to three times a tensor.
        target: where they go.
        progress: called after each weight.

    Raises:
        PackedError: if something unpacks to something else.
    """
    total, done = sum(sum(p.plain_bytes.values()) for p in plan.files.values()), 0
    for file, planned in plan.files.items():
        with target.open(file) as stream:
            _write(
                planned, file, source, TensorFile(stream, planned.tensors, source.metadata(file))
            )
        for name, size in planned.plain_bytes.items():
            _check_same(name, source.read(file, name), _read_back(planned, file, name, target))
            done += size
            progress(done, total)


def _planned(source: TensorSource, file: str) -> PlannedFile:
    names = source.files[file]
    planned = PlannedFile(tensors={}, positions={}, entries={}, plain_bytes={})
    for name in names:
        tensor = source.read(file, name)
        planned.plain_bytes[name] = tensor.nbytes
        planned.tensors[name] = tensor.dtype, tuple(tensor.shape)
        layout = packed_layout(tensor)
        if layout is None:
            continue
        positions = f"{name}_{layout.encoding}"
        if positions in names:
            raise PackedError(f"{file}: {positions} is a tensor already")
        planned.tensors[name] = tensor.dtype, (layout.num_values,)
        planned.tensors[positions] = torch.uint8, (layout.num_positions,)
        planned.positions[positions] = name
        planned.entries[name] = {"shape": list(tensor.shape), "encoding": layout.encoding}
    return planned


def _write(planned: PlannedFile, file: str, source: TensorSource, written: TensorFile) -> None:
    for name in written.order:
        weight = planned.positions.get(name, name)
        tensor = source.read(file, weight)
        parts = iter([tensor])
        if weight in planned.entries:
            encoding: Encoding = planned.entries[weight]["encoding"]
            packed = packed_values if name == weight else packed_positions
            parts = packed(tensor, encoding)
        for part in parts:
            written.write(name, part)
    written.finish()


def _read_back(planned: PlannedFile, file: str, name: str, target: FileTarget) -> Tensor:
    if name not in planned.entries:
        return target.read(file, name)
    entry = planned.entries[name]
    encoding, shape = entry["encoding"], tuple(entry["shape"])
    positions = target.read(file, f"{name}_{encoding}")
    return unpacked(name, target.read(file, name), positions, encoding, shape)


def _check_same(name: str, tensor: Tensor, found: Tensor) -> None:
    same = tensor.shape == found.shape and torch.equal(
        tensor.reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8)
    )
    if not same:
        raise PackedError(f"{name} does not unpack to what was packed: memory or disk is faulty")
