"""Packed checkpoints: folders of Hugging Face's layout whose pruned matrices are written without zeros.

Of a packed matrix the file has two tensors: its values, 1-D, under the weight's own name, so that whoever
loads it without unpacking fails on the shape; and where they stand, uint8, under `<name>_bitmask` or
`<name>_gaps` (`mgpp.sparse.packing`). `quantization_config` in `config.json` names the packed weights and
their shapes. All other tensors and files are as they were, but for a section of `README.md` that says
how to load it. Tensor by tensor: memory for one.
"""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgpp.sparse.packed_files import (
    PackingPlan,
    Progress,
    plan_packing,
    unseen,
    write_packed_files,
)
from mgpp.sparse.reading import (
    CONFIG,
    INDEX,
    QUANT_METHOD,
    SINGLE,
    VERSION,
    PackedError,
    config_of,
    contents,
    packed_weights,
    read_json,
    read_tensor,
    tensor_bytes,
    unpacked,
    weight_files,
)
from mgpp.tensor_file import Stream, TensorFile

_CARD = "README.md"
_CARD_BEGIN, _CARD_END = "\n<!-- mgpp-packed -->\n", "<!-- /mgpp-packed -->\n"
_CARD_SECTION = f"""{_CARD_BEGIN}
## Packed weights

Matrices of this copy are stored without their zeros. To load it in transformers, with `pip install mgpp`:

```python
import mgpp.integrations.transformers  # lets from_pretrained unpack
```

For all other tools, `mgpp unpack FOLDER OUTPUT` writes the plain checkpoint.
{_CARD_END}"""


class NothingToPackError(PackedError):
    """A checkpoint that packing would not make smaller."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What became of a checkpoint.

    Attributes:
        plain_bytes: of its weight files, unpacked.
        packed_bytes: of its weight files, packed.
        packed: the packed weights.
    """

    plain_bytes: int
    packed_bytes: int
    packed: tuple[str, ...]


def pack_checkpoint(source: Path, output: Path, *, progress: Progress = unseen) -> Packing:
    """Write a packed copy of a checkpoint, and check that it unpacks to the same bits.

    Args:
        source: a folder with `config.json` and safetensors files.
        output: a folder that is made; it must not exist.
        progress: called after each weight.

    Returns:
        Its sizes before and after.

    Raises:
        NothingToPackError: if packing makes nothing in it smaller.
        PackedError: if there is no such checkpoint, or it is quantized or packed already.
        FileExistsError: if there is something at `output`.
    """
    config = config_of(source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise PackedError(
            f"{source} is quantized already ({method}): only plain weights are packed"
        )
    weights = _FolderFiles(source)
    with _written_whole(output, source) as folder:
        plan = plan_packing(weights)
        if not plan.entries:
            raise NothingToPackError(
                f"{source} has no matrix with so many zeros that packing it would make it smaller"
            )
        write_packed_files(plan, weights, _FolderFiles(folder), progress)
        write_packed_rest(plan, source, folder)
        sizes = [sum(f.stat().st_size for f in weight_files(each)) for each in (source, folder)]
    return Packing(plain_bytes=sizes[0], packed_bytes=sizes[1], packed=tuple(sorted(plan.entries)))


def write_packed_rest(plan: PackingPlan, source: Path, folder: Path) -> None:
    """Write what goes with packed weight files: configuration, index, model card, tokenizer.

    Args:
        plan: of the files.
        source: the plain checkpoint; its weights may be elsewhere.
        folder: the packed one.
    """
    made = {"quant_method": QUANT_METHOD, "version": VERSION, "tensors": plan.entries}
    _write_json(folder / CONFIG, {**config_of(source), "quantization_config": made})
    _copy_rest(source, folder, plan.weight_map, sum(plan.weight_bytes.values()))
    card = folder / _CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    card.write_text(text + _CARD_SECTION, encoding="utf-8")


def unpack_checkpoint(source: Path, output: Path, *, progress: Progress = unseen) -> Packing:
    """Write a plain copy of a packed checkpoint: the tensors and the configuration that were packed.

    Args:
        source: a packed folder.
        output: a folder that is made; it must not exist.
        progress: called after each weight.

    Returns:
        Its sizes after and before.

    Raises:
        PackedError: if the folder is not packed, or something in it does not fit together.
        FileExistsError: if there is something at `output`.
    """
    config = config_of(source)
    entries = packed_weights(config)
    if entries is None:
        raise PackedError(f"{source} is not packed: its {CONFIG} names no {QUANT_METHOD}")
    files = weight_files(source)
    _check_names(source, files, entries)
    total = sum(tensor_bytes(source, plain=True).values())
    done = _Done(total, progress)
    with _written_whole(output, source) as folder:
        weight_map: dict[str, str] = {}
        for file in files:
            _unpack_file(file, folder / file.name, entries, weight_map, done)
        _write_json(
            folder / CONFIG, {k: v for k, v in config.items() if k != "quantization_config"}
        )
        _copy_rest(source, folder, weight_map, total)
        _take_back_section(folder / _CARD)
        sizes = [sum(f.stat().st_size for f in weight_files(each)) for each in (folder, source)]
    return Packing(plain_bytes=sizes[0], packed_bytes=sizes[1], packed=tuple(sorted(entries)))


class _FolderFiles:
    """The weight files of a folder, read and written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def files(self) -> Mapping[str, Sequence[str]]:
        return {file.name: contents(file)[0] for file in weight_files(self._folder)}

    def metadata(self, file: str) -> Mapping[str, str] | None:
        return contents(self._folder / file)[1]

    def read(self, file: str, name: str) -> Tensor:
        return read_tensor(self._folder / file, name)

    def open(self, file: str) -> AbstractContextManager[Stream]:
        return (self._folder / file).open("wb")


class _Done:
    """Counts bytes of plain weights as they are done."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, tensor: Tensor) -> None:
        self._done += tensor.nbytes
        self._progress(self._done, self._total)


def _unpack_file(
    file: Path,
    output: Path,
    entries: Mapping[str, dict[str, Any]],
    weight_map: dict[str, str],
    done: _Done,
) -> None:
    names, metadata = contents(file)
    positions = {f"{name}_{entry['encoding']}" for name, entry in entries.items()}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        if name not in positions:
            tensor = read_tensor(file, name)
            shape = entries[name]["shape"] if name in entries else tensor.shape
            shapes[name] = tensor.dtype, tuple(shape)
    with output.open("wb") as stream:
        written = TensorFile(stream, shapes, metadata)
        for name in written.order:
            packed = name in entries
            tensor = (
                _unpacked_from(file, name, entries[name]) if packed else read_tensor(file, name)
            )
            written.write(name, tensor)
            done.add(tensor)
        written.finish()
    weight_map |= dict.fromkeys(shapes, output.name)


def _unpacked_from(file: Path, name: str, entry: Mapping[str, Any]) -> Tensor:
    encoding = entry["encoding"]
    positions = read_tensor(file, f"{name}_{encoding}")
    return unpacked(name, read_tensor(file, name), positions, encoding, tuple(entry["shape"]))


def _check_names(source: Path, files: list[Path], entries: Mapping[str, dict[str, Any]]) -> None:
    """Make sure that files and configuration belong together."""
    held = {name: file for file in files for name in contents(file)[0]}
    for name, entry in entries.items():
        for needed in (name, f"{name}_{entry['encoding']}"):
            if needed not in held:
                raise PackedError(f"{source}: {CONFIG} names {name}, but no file has {needed}")
        if held[name] != held[f"{name}_{entry['encoding']}"]:
            raise PackedError(f"{source}: values and positions of {name} are in different files")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_rest(source: Path, folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Copy what is no weight, and write the index where there is one."""
    left_out = {*weight_map.values(), CONFIG, INDEX}
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and str(relative) not in left_out:
            (folder / relative.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
    if SINGLE not in weight_map.values():
        index = read_json(source / INDEX)
        metadata = {**(index.get("metadata") or {}), "total_size": total_size}
        _write_json(folder / INDEX, {**index, "metadata": metadata, "weight_map": weight_map})


def _take_back_section(card: Path) -> None:
    """Remove from a model card what packing added."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, begin, rest = text.partition(_CARD_BEGIN)
    left = before + rest.partition(_CARD_END)[2]
    if begin and left:
        card.write_text(left, encoding="utf-8")
    elif begin:
        card.unlink()


@contextmanager
def _written_whole(output: Path, source: Path) -> Iterator[Path]:
    """Give a folder to write to that takes its place when all is written."""
    if output.exists():
        raise FileExistsError(f"{output} exists already")
    if output.resolve().is_relative_to(source.resolve()):
        raise PackedError(f"{output} lies in {source}, which is copied there: name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
