"""A sharded training state in files, by parameter name and range: read back in whatever cut is needed.

    state-r00003-00000.safetensors   tensors "<parameter>:<offset>:<key>", 1-D
    index-r00003.json                what worker 3 wrote: ranges, their keys and counters, the file

A reader looks at what its own predecessor wrote first, so that nothing else is touched where the world
size and the ZeRO stage are the same.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mgpp.backends.deepspeed import TrainedShard
from mgpp.tensor_file import HEADER_START, TensorPlace, header_end, places, write_tensors
from pipeline.errors import StageError
from pipeline.storage.writing import run_at_once
from pipeline.store.checkpoints import CheckpointFiles, SavedCheckpoint

_FILE_BYTES = (
    256 << 20
)  # a few files are written at a time, and few blocks of one are held at reading
_FILES_AT_ONCE = 4  # an object store takes the parts of one file one after the other
_MASTER, _KEEP = "master", "keep"
_PACKED = (_KEEP, "zeros")  # the mask, and the zeros that are kept, where any are


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Elements `offset` to `offset + numel` of a parameter, and where they lie.

    Attributes:
        keys: what is kept of them: "master" and the optimizer's values, or "keep", the packed mask.
        counters: the optimizer's numbers for the parameter.
        file: the file that holds the tensors.
    """

    name: str
    offset: int
    numel: int
    keys: list[str]
    counters: dict[str, float]
    file: str

    def tensor_name(self, key: str) -> str:
        return f"{self.name}:{self.offset}:{key}"


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file that is to be written: its ranges and their tensors by name."""

    name: str
    ranges: list[_Range] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class ShardWriter:
    """One worker's shards, first put in files, then written to storage a few MiB at a time.

    Tensors are not copied before they are written, unless `copy_to_host` is called.

    Args:
        rank: of the worker.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._files: list[_File] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.num_bytes for file in self._files)

    def add_trained(self, shards: Iterable[TrainedShard]) -> None:
        """Add shards of trained parameters with their optimizer state."""
        for shard in shards:
            self._add(shard.name, shard.offset, shard.numel, shard.values, shard.counters)

    def add_masks(self, masks: Iterable[dict[str, Any]]) -> None:
        """Add packed masks and what the method keeps, as `Pruner.state_dict` gives them."""
        for mask in masks:
            values = {key: mask[key] for key in _PACKED if key in mask} | mask["state"]
            self._add(mask["name"], mask["offset"], mask["numel"], values, {})

    def copy_to_host(self) -> None:
        """Copy all tensors to the host's memory, so that the training may change them meanwhile."""
        for file in self._files:
            for name, tensor in file.tensors.items():
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                file.tensors[name] = copy.copy_(tensor)

    def write(self, files: CheckpointFiles) -> None:
        """Write all shards, several files at once, and the index."""
        run_at_once((partial(_write, files, file) for file in self._files), _FILES_AT_ONCE)
        index = [asdict(range_) for file in self._files for range_ in file.ranges]
        files.put(_index_file(self._rank), json.dumps(index).encode())

    def _add(
        self,
        name: str,
        offset: int,
        numel: int,
        values: dict[str, Tensor],
        counters: dict[str, float],
    ) -> None:
        if numel == 0:
            return
        if not self._files or self._files[-1].num_bytes >= _FILE_BYTES:
            self._files.append(
                _File(name=f"state-r{self._rank:05d}-{len(self._files):05d}.safetensors")
            )
        file = self._files[-1]
        range_ = _Range(
            name=name,
            offset=offset,
            numel=numel,
            keys=list(values),
            counters=counters,
            file=file.name,
        )
        file.ranges.append(range_)
        file.tensors.update({range_.tensor_name(key): value for key, value in values.items()})


def _write(files: CheckpointFiles, file: _File) -> None:
    with files.file(file.name) as stream:
        write_tensors(stream, file.tensors)


class ShardReader:
    """Reads any range of what all workers wrote, and no other bytes than of the blocks they lie in.

    Args:
        saved: the checkpoint.
        first: the worker whose shards are looked at first: the likeliest to have what is wanted.
    """

    def __init__(self, saved: SavedCheckpoint, first: int) -> None:
        self._read = saved.read
        self._writers = iter(index_writers(saved.manifest.files, first))
        self._ranges: dict[str, list[_Range]] = defaultdict(list)
        self._places: dict[str, dict[str, TensorPlace]] = {}

    def trained(
        self, name: str, offset: int, numel: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return a range of a trained parameter: the master weights, the optimizer's values, counters.

        Raises:
            StageError: if the checkpoint does not hold all of it.
        """
        ranges = self._find(name, offset, numel, _MASTER)
        values = {
            key: torch.cat([self._slice(range_, key, offset, numel) for range_ in ranges])
            for key in ranges[0].keys
        }
        return values, ranges[0].counters

    def masks(self, name: str, offset: int, numel: int) -> Iterator[dict[str, Any]]:
        """Yield the masks that cover a range of a weight, as `Pruner.load_state_dict` takes them.

        Raises:
            StageError: if the checkpoint does not hold all of them.
        """
        for range_ in self._find(name, offset, numel, _KEEP):
            values = {key: self._tensor(range_, key) for key in range_.keys}
            yield {
                "name": name,
                "offset": range_.offset,
                "numel": range_.numel,
                **{key: values.pop(key) for key in _PACKED if key in values},
                "state": values,
            }

    def _find(self, name: str, offset: int, numel: int, key: str) -> list[_Range]:
        """Return the ranges with a key that make up a range, in order, reading indexes as needed."""
        end = offset + numel
        while True:
            found, at = [], offset
            for range_ in sorted(self._ranges[name], key=lambda r: r.offset):
                if key in range_.keys and range_.offset <= at < range_.offset + range_.numel:
                    found.append(range_)
                    at = range_.offset + range_.numel
                    if at >= end:
                        return found
            if not self._read_next_index():
                raise StageError(
                    f"the checkpoint holds no {key} of {name} from element {at} on: it is of another "
                    "model; delete the stage's checkpoints folder to start again"
                )

    def _read_next_index(self) -> bool:
        writer = next(self._writers, None)
        if writer is None:
            return False
        for entry in json.loads(self._read(_index_file(writer))):
            self._ranges[entry["name"]].append(_Range(**entry))
        return True

    def _slice(self, range_: _Range, key: str, offset: int, numel: int) -> Tensor:
        begin = max(offset - range_.offset, 0)
        end = min(offset + numel - range_.offset, range_.numel)
        return self._tensor(range_, key, begin, end)

    def _tensor(self, range_: _Range, key: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Return elements of a 1-D tensor, all of them unless a part is asked for."""
        place = self._place(range_.file, range_.tensor_name(key))
        first, last = place.bytes_of(begin, place.shape[0] if end is None else end)
        data = bytearray(
            self._read(range_.file, first, last)
        )  # torch wants to be able to write to it
        return torch.frombuffer(data, dtype=place.dtype)

    def _place(self, file: str, tensor: str) -> TensorPlace:
        if file not in self._places:
            end = header_end(self._read(file, 0, HEADER_START))
            self._places[file] = places(self._read(file, 0, end))
        return self._places[file][tensor]


def index_writers(files: Iterable[str], first: int) -> list[int]:
    """Return which workers wrote shards, of a checkpoint's files; `first` leads if it is among them."""
    names = (name for name in files if name.startswith("index-r"))
    ranks = [int(name.removeprefix("index-r").removesuffix(".json")) for name in names]
    return sorted(ranks, key=lambda rank: (rank != first, rank))


def _index_file(rank: int) -> str:
    return f"index-r{rank:05d}.json"
