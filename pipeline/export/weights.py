"""The weights of an export: copied part by part to storage, and given again to be packed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from mgpp.tensor_file import Stream, TensorFile
from pipeline.models.weights import positive_zeros
from pipeline.saving.checkpoint_files import TensorReader, file_names, whole
from pipeline.saving.contents import Spec, Unit
from pipeline.storage.outputs import OutputFiles
from pipeline.storage.writing import run_at_once

FILES_AT_ONCE = 4  # storage answers slowly, and takes several files as fast as one
_METADATA = {"format": "pt"}


class ExportedWeights:
    """What the plain files hold: what was trained, cast, with plain zeros.

    Args:
        trained: the trained weights.
        units: what the files hold, in the dtypes that they are cast to.
        max_bytes: of a file, unless a tensor alone is larger.

    Attributes:
        specs: by file, dtype and shape of its tensors by name.
    """

    def __init__(self, trained: TensorReader, units: Iterable[Unit], max_bytes: int) -> None:
        self._trained = trained
        self.specs = _cut(units, max_bytes)

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """The names of the tensors in each file."""
        return {file: list(specs) for file, specs in self.specs.items()}

    @property
    def weight_bytes(self) -> dict[str, int]:
        """The bytes of each weight, by name."""
        return {n: spec.nbytes for specs in self.specs.values() for n, spec in specs.items()}

    def metadata(self, file: str) -> Mapping[str, str]:
        """Return what a file's header says beside its tensors."""
        return _METADATA

    def read(self, file: str, name: str) -> Tensor:
        """Return one tensor."""
        spec = self.specs[file][name]
        return whole(spec, self._parts(name, spec))

    def write(self, files: OutputFiles, folder: str) -> None:
        """Write the files to a folder of the output, several at once."""
        jobs = (partial(self._write_file, files, folder, file) for file in self.specs)
        run_at_once(jobs, FILES_AT_ONCE)

    def _write_file(self, files: OutputFiles, folder: str, file: str) -> None:
        specs = self.specs[file]
        with files.open(f"{folder}/{file}") as stream:
            tensors = {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
            written = TensorFile(stream, tensors, _METADATA)
            for name in written.order:
                for part in self._parts(name, specs[name]):
                    written.write(name, part)
            written.finish()

    def _parts(self, name: str, spec: Spec) -> Iterator[Tensor]:
        return (positive_zeros(part.to(spec.dtype)) for part in self._trained.parts(name))


class PackedOutput:
    """Where packed files go: a folder of the output, from which they are read again."""

    def __init__(self, files: OutputFiles, folder: str) -> None:
        self._files, self._folder = files, folder
        self._reader: TensorReader | None = None

    def open(self, file: str) -> AbstractContextManager[Stream]:
        """Give a stream that is the file when the block ends."""
        return self._files.open(f"{self._folder}/{file}")

    def read(self, file: str, name: str) -> Tensor:
        """Return one tensor of a file that was written."""
        if self._reader is None or file not in self._reader.files:
            self._reader = TensorReader(f"{self._files.url}/{self._folder}", [file])
        return whole(self._reader.specs[name], self._reader.parts(name))


def _cut(units: Iterable[Unit], max_bytes: int) -> dict[str, dict[str, Spec]]:
    """Return which tensors are in which file."""
    files: list[dict[str, Spec]] = []
    room = 0
    for name, spec in ((name, spec) for unit in units for name, spec in unit.outputs.items()):
        if spec.nbytes > room:
            files.append({})
            room = max_bytes
        files[-1][name] = spec
        room -= spec.nbytes
    return dict(zip(file_names(len(files)), files, strict=True))
