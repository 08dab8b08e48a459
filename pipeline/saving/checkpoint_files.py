"""The weight files of a Hugging Face checkpoint: their names and index, and reading them by parts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pipeline.models.weight_files import weight_files
from pipeline.saving.contents import Spec

PART_BYTES = 16 << 20
_MAPPED_BYTES = 64 << 20  # read of a mapped file before it is mapped anew, which gives memory back


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


class TensorReader:
    """Reads the tensors of a checkpoint's safetensors files by parts.

    Attributes:
        specs: dtype and shape of every tensor, by name.

    Args:
        folder: of the checkpoint.

    Raises:
        DamagedFileError: if the index is damaged, or names a file that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.specs: dict[str, Spec] = {}
        self._paths: dict[str, Path] = {}
        self._opened: tuple[Path, Any] | None = None
        self._read = 0
        for path in weight_files(folder):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    self._paths[name] = path
                    self.specs[name] = _spec(file, name)

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's values in row-major order, 1-D, of about `PART_BYTES` each."""
        spec = self.specs[name]
        if spec.nbytes <= PART_BYTES or len(spec.shape) < 2:
            yield self._file(name, spec.nbytes).get_tensor(name).reshape(-1)
            return
        num_rows = spec.shape[0]
        step = max(PART_BYTES * num_rows // spec.nbytes, 1)
        for begin in range(0, num_rows, step):
            end = min(begin + step, num_rows)
            size = spec.nbytes * (end - begin) // num_rows
            yield self._file(name, size).get_slice(name)[begin:end].reshape(-1)

    def _file(self, name: str, size: int) -> Any:
        path = self._paths[name]
        if self._opened is None or self._opened[0] != path or self._read > _MAPPED_BYTES:
            self._opened, self._read = None, 0
            self._opened = (path, safe_open(path, "pt"))
        self._read += size
        return self._opened[1]


def _spec(file: Any, name: str) -> Spec:
    part = file.get_slice(name)
    shape = tuple(part.get_shape())
    tensor = part[:0] if shape else file.get_tensor(name)
    return Spec(tensor.dtype, shape)
