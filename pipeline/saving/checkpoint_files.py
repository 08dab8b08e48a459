"""The weight files of a Hugging Face checkpoint: their names and index, and reading them by parts."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mgpp.tensor_file import HEADER_START, TensorPlace, header_end, places
from pipeline.errors import DamagedFileError
from pipeline.models.weight_files import weight_files
from pipeline.saving.contents import Spec
from pipeline.storage.filesystems import open_storage

PART_BYTES = 16 << 20


def file_names(number: int) -> list[str]:
    """Return what so many files are called."""
    if number == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]


def write_index(folder: Path, files: Mapping[str, Mapping[str, Spec]]) -> None:
    """Write which file holds which tensor, if there are several files.

    Args:
        folder: of the checkpoint.
        files: by their names, the tensors in them.
    """
    if len(files) == 1:
        return
    specs = [spec for tensors in files.values() for spec in tensors.values()]
    index = {
        "metadata": {
            "total_parameters": sum(spec.numel for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def whole(spec: Spec, parts: Iterable[Tensor]) -> Tensor:
    """Return a tensor made of its parts."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    flat, at = tensor.view(-1), 0
    for part in parts:
        flat[at : at + part.numel()] = part
        at += part.numel()
    assert at == spec.numel
    return tensor


class TensorReader:
    """Reads the tensors of safetensors files by parts, of this machine or of storage; any thread may.

    Attributes:
        url: of the folder.
        specs: dtype and shape of every tensor, by name.
        files: the names of the tensors in each file.

    Args:
        url: of the folder that the files lie in.
        files: their names; those that transformers reads of a local folder, unless given.

    Raises:
        DamagedFileError: if a file is cut off; if the index is damaged, or names a file that is missing.
    """

    def __init__(self, url: str, files: Iterable[str] | None = None) -> None:
        self._fs, self._root = open_storage(url)
        self.url = url
        self.files: dict[str, list[str]] = {}
        self._places: dict[str, tuple[str, TensorPlace]] = {}
        for file in [path.name for path in weight_files(Path(url))] if files is None else files:
            end = header_end(self._read(file, 0, HEADER_START))
            found = places(self._read(file, 0, end))
            self.files[file] = list(found)
            self._places |= {name: (file, place) for name, place in found.items()}
        self.specs = {n: Spec(place.dtype, place.shape) for n, (_, place) in self._places.items()}

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's values in row-major order, 1-D, of at most about `PART_BYTES` each.

        Raises:
            DamagedFileError: if the file is cut off.
        """
        file, place = self._places[name]
        numel, step = self.specs[name].numel, max(PART_BYTES // place.dtype.itemsize, 1)
        for first in range(0, numel, step):
            data = self._read(file, *place.bytes_of(first, min(first + step, numel)))
            yield torch.frombuffer(bytearray(data), dtype=place.dtype)  # torch wants to write to it

    def _read(self, file: str, begin: int, end: int) -> bytes:
        data = bytes(self._fs.cat_file(f"{self._root.rstrip('/')}/{file}", start=begin, end=end))
        if len(data) != end - begin:
            raise DamagedFileError(f"{file} is cut off: it has {begin + len(data)} bytes")
        return data
