"""A sharded training state in files, by parameter name and range: read back in whatever cut is needed.

    state-r00003-00000.safetensors   tensors "<parameter>:<offset>:<key>", 1-D
    index-r00003.json                what worker 3 wrote: ranges, their keys and counters, the file

A reader looks at what its own predecessor wrote first, so that nothing else is touched where the world
size and the ZeRO stage are the same.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mgpp.backends.deepspeed import TrainedShard
from pipeline.errors import StageError

_FILE_BYTES = 1 << 30  # a file is made in memory before it is written
_MASTER, _KEEP = "master", "keep"


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


class ShardWriter:
    """Writes one worker's shards into a folder, at most a gigabyte or so in memory at a time."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._ranges: list[_Range] = []
        self._tensors: dict[str, Tensor] = {}
        self._num_files = self._num_bytes = 0

    def add_trained(self, shards: Iterable[TrainedShard]) -> None:
        """Add shards of trained parameters with their optimizer state."""
        for shard in shards:
            self._add(shard.name, shard.offset, shard.numel, shard.values, shard.counters)

    def add_masks(self, masks: Iterable[dict[str, Any]]) -> None:
        """Add packed masks and what the method keeps, as `Pruner.state_dict` gives them."""
        for mask in masks:
            values = {_KEEP: mask["keep"], **mask["state"]}
            self._add(mask["name"], mask["offset"], mask["numel"], values, {})

    def close(self) -> None:
        """Write what is left, and the index."""
        self._flush()
        index = [asdict(range_) for range_ in self._ranges]
        (self._folder / _index_file(self._rank)).write_text(json.dumps(index))

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
        range_ = _Range(
            name=name,
            offset=offset,
            numel=numel,
            keys=list(values),
            counters=counters,
            file=self._file,
        )
        self._ranges.append(range_)
        self._tensors |= {range_.tensor_name(key): value for key, value in values.items()}
        self._num_bytes += sum(value.nbytes for value in values.values())
        if self._num_bytes >= _FILE_BYTES:
            self._flush()

    @property
    def _file(self) -> str:
        return f"state-r{self._rank:05d}-{self._num_files:05d}.safetensors"

    def _flush(self) -> None:
        if self._tensors:
            save_file(self._tensors, self._folder / self._file)
            self._num_files += 1
            self._tensors, self._num_bytes = {}, 0


class ShardReader:
    """Reads any range of what all workers wrote; use it as a context manager.

    Args:
        file: gives the local path of a file of the checkpoint.
        writers: the workers that wrote shards, the likeliest first.
    """

    def __init__(self, file: Callable[[str], Path], writers: Iterable[int]) -> None:
        self._file = file
        self._writers = iter(writers)
        self._ranges: dict[str, list[_Range]] = defaultdict(list)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

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
            file = self._opened(range_.file)
            values = {key: file.get_tensor(range_.tensor_name(key)) for key in range_.keys}
            yield {
                "name": name,
                "offset": range_.offset,
                "numel": range_.numel,
                "keep": values.pop(_KEEP),
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
        for entry in json.loads(self._file(_index_file(writer)).read_text()):
            self._ranges[entry["name"]].append(_Range(**entry))
        return True

    def _slice(self, range_: _Range, key: str, offset: int, numel: int) -> Tensor:
        begin = max(offset - range_.offset, 0)
        end = min(offset + numel - range_.offset, range_.numel)
        part: Tensor = self._opened(range_.file).get_slice(range_.tensor_name(key))[begin:end]
        return part

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            handle = safe_open(str(self._file(file)), framework="pt")
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file]


def index_writers(files: Iterable[str], first: int) -> list[int]:
    """Return which workers wrote shards, of a checkpoint's files; `first` leads if it is among them."""
    names = (name for name in files if name.startswith("index-r"))
    ranks = [int(name.removeprefix("index-r").removesuffix(".json")) for name in names]
    return sorted(ranks, key=lambda rank: (rank != first, rank))


def _index_file(rank: int) -> str:
    return f"index-r{rank:05d}.json"
