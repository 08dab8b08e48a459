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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgpp.sparse.packing import (
    ENCODINGS,
    Encoding,
    Layout,
    layout_of,
    packed_positions,
    packed_values,
    unpack,
)
from mgpp.tensor_file import TensorFile

QUANT_METHOD = "mgpp-packed"
VERSION = 1
_CONFIG, _CARD = "config.json", "README.md"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LEAST_BYTES = 4096  # of a tensor: less is not worth two
_MOST_OF_PLAIN = 0.99
_CARD_BEGIN, _CARD_END = "\n<!-- mgpp-packed -->\n", "<!-- /mgpp-packed -->\n"
_CARD_SECTION = f"""{_CARD_BEGIN}
## Packed weights

Matrices of this copy are stored without their zeros. To load it in transformers, with `pip install mgpp`:

```python
import mgpp.integrations.transformers  # lets from_pretrained unpack
```

For all other tools, `mgpp unpack FOLDER OUTPUT` writes the plain checkpoint.
{_CARD_END}"""

Progress = Callable[[int, int], None]
"""Called with the bytes that are done, and with all, of the plain weights."""


def _unseen(done: int, total: int) -> None:
    """Show no progress."""


class PackedError(ValueError):
    """A checkpoint that cannot be packed or unpacked; says which file or tensor, and why."""


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


def packed_weights(config: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Return the packed weights that a model's configuration names, with `shape` and `encoding`.

    Returns:
        None if the checkpoint is not packed.

    Raises:
        PackedError: if it is packed, in a way that is not known.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        return None
    if found.get("version") != VERSION:
        raise PackedError(
            f"quantization_config.version is {found.get('version')!r}; this mgpp reads {VERSION}: "
            "install a newer one"
        )
    tensors = found.get("tensors")
    if not isinstance(tensors, Mapping) or not all(map(_is_entry, tensors.values())):
        raise PackedError("quantization_config.tensors is damaged: no shape and encoding by name")
    return {name: dict(entry) for name, entry in tensors.items()}


def pack_checkpoint(source: Path, output: Path, *, progress: Progress = _unseen) -> Packing:
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
    entries: dict[str, dict[str, Any]] = {}
    files = weight_files(source)
    done = _Done(sum(tensor_bytes(source).values()), progress)
    with _written_whole(output, source) as folder:
        weight_map: dict[str, str] = {}
        for file in files:
            entries |= _pack_file(file, folder / file.name, weight_map, done)
        if not entries:
            raise NothingToPackError(
                f"{source} has no matrix with so many zeros that packing it would make it smaller"
            )
        made = {"quant_method": QUANT_METHOD, "version": VERSION, "tensors": entries}
        _write_json(folder / _CONFIG, {**config, "quantization_config": made})
        _copy_rest(source, folder, weight_map)
        card = folder / _CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        card.write_text(text + _CARD_SECTION, encoding="utf-8")
        sizes = [sum(f.stat().st_size for f in weight_files(each)) for each in (source, folder)]
    return Packing(plain_bytes=sizes[0], packed_bytes=sizes[1], packed=tuple(sorted(entries)))


def unpack_checkpoint(source: Path, output: Path, *, progress: Progress = _unseen) -> Packing:
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
        raise PackedError(f"{source} is not packed: its {_CONFIG} names no {QUANT_METHOD}")
    files = weight_files(source)
    _check_names(source, files, entries)
    done = _Done(sum(tensor_bytes(source, plain=True).values()), progress)
    with _written_whole(output, source) as folder:
        weight_map: dict[str, str] = {}
        for file in files:
            _unpack_file(file, folder / file.name, entries, weight_map, done)
        _write_json(
            folder / _CONFIG, {k: v for k, v in config.items() if k != "quantization_config"}
        )
        _copy_rest(source, folder, weight_map)
        _take_back_section(folder / _CARD)
        sizes = [sum(f.stat().st_size for f in weight_files(each)) for each in (folder, source)]
    return Packing(plain_bytes=sizes[0], packed_bytes=sizes[1], packed=tuple(sorted(entries)))


def tensor_bytes(folder: Path, *, plain: bool = False) -> dict[str, int]:
    """Return the bytes of each weight in the files of a checkpoint, packed or not, by name.

    Args:
        folder: of the checkpoint.
        plain: count a packed weight as it is unpacked; otherwise its values and positions.

    Raises:
        PackedError: if there is no such checkpoint, or a file is damaged.
    """
    entries = packed_weights(config_of(folder)) or {}
    weights = {f"{name}_{entry['encoding']}": name for name, entry in entries.items()}
    found: dict[str, int] = {}
    for file in weight_files(folder):
        for name in contents(file)[0]:
            tensor, weight = read_tensor(file, name), weights.get(name, name)
            if not plain:
                found[weight] = found.get(weight, 0) + tensor.nbytes
            elif name in entries:
                found[name] = prod(entries[name]["shape"]) * tensor.itemsize
            elif name == weight:
                found[name] = tensor.nbytes
    return found


def packed_layout(tensor: Tensor) -> Layout | None:
    """Return how a checkpoint's tensor is packed; None if it is stored as it is."""
    if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.nbytes < _LEAST_BYTES:
        return None
    layout = layout_of(tensor)
    return layout if layout.num_bytes(tensor.itemsize) <= _MOST_OF_PLAIN * tensor.nbytes else None


def unpacked(
    name: str, values: Tensor, positions: Tensor, encoding: Encoding, shape: tuple[int, ...]
) -> Tensor:
    """Return the weight of a name; as `unpack`, with the name in the error.

    Raises:
        PackedError: if values, positions and shape do not belong together.
    """
    try:
        return unpack(values, positions, encoding, shape)
    except (ValueError, RuntimeError) as error:
        raise PackedError(f"{name} is damaged, or of another model: {error}") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """Return one tensor; memory that maps the file goes with it.

    Raises:
        PackedError: if the file is damaged or has no such tensor.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise PackedError(f"{file}: {name}: {error}") from error
    return tensor


class _Done:
    """Counts bytes of plain weights as they are done."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, tensor: Tensor) -> None:
        self._done += tensor.nbytes
        self._progress(self._done, self._total)


def _pack_file(
    file: Path, output: Path, weight_map: dict[str, str], done: _Done
) -> dict[str, dict[str, Any]]:
    """Write a file packed; return the entries of what is packed in it, and note what it holds."""
    names, metadata = contents(file)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    sources: dict[str, tuple[str, Encoding]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name in names:
        tensor = read_tensor(file, name)
        shapes[name] = tensor.dtype, tuple(tensor.shape)
        layout = packed_layout(tensor)
        if layout is None:
            continue
        positions = f"{name}_{layout.encoding}"
        if positions in names:
            raise PackedError(f"{file}: {positions} is a tensor already")
        shapes[name] = tensor.dtype, (layout.num_values,)
        shapes[positions] = torch.uint8, (layout.num_positions,)
        sources[positions] = name, layout.encoding
        entries[name] = {"shape": list(tensor.shape), "encoding": layout.encoding}
    with output.open("wb") as stream:
        written = TensorFile(stream, shapes, metadata)
        for name in written.order:
            if name in sources:
                weight, encoding = sources[name]
                parts = packed_positions(read_tensor(file, weight), encoding)
            elif name in entries:
                parts = packed_values(read_tensor(file, name), entries[name]["encoding"])
            else:
                parts = iter([read_tensor(file, name)])
            for part in parts:
                written.write(name, part)
        written.finish()
    weight_map |= dict.fromkeys(shapes, output.name)
    for name in names:
        tensor, packed = read_tensor(file, name), name in entries
        made = _unpacked_from(output, name, entries[name]) if packed else read_tensor(output, name)
        _check_same(name, tensor, made)
        done.add(tensor)
    return entries


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


def _check_same(name: str, tensor: Tensor, found: Tensor) -> None:
    same = tensor.shape == found.shape and torch.equal(
        tensor.reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8)
    )
    if not same:
        raise PackedError(f"{name} does not unpack to what was packed: memory or disk is faulty")


def _check_names(source: Path, files: list[Path], entries: Mapping[str, dict[str, Any]]) -> None:
    """Make sure that files and configuration belong together."""
    held = {name: file for file in files for name in contents(file)[0]}
    for name, entry in entries.items():
        for needed in (name, f"{name}_{entry['encoding']}"):
            if needed not in held:
                raise PackedError(f"{source}: {_CONFIG} names {name}, but no file has {needed}")
        if held[name] != held[f"{name}_{entry['encoding']}"]:
            raise PackedError(f"{source}: values and positions of {name} are in different files")


def contents(file: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of a file's tensors, and its metadata.

    Raises:
        PackedError: if it is damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys()), opened.metadata()
    except (SafetensorError, OSError) as error:
        raise PackedError(f"{file}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads: the one file, or those the index names.

    Raises:
        PackedError: if there are none, or the index is damaged.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        raise PackedError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise PackedError(f"{index} is damaged: it has no weight_map of file names")
    return [folder / name for name in sorted(set(names.values()))]


def config_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `config.json`.

    Raises:
        PackedError: if there is none, or it is damaged.
    """
    if not (folder / _CONFIG).is_file():
        raise PackedError(f"{folder} is no checkpoint: it has no {_CONFIG}")
    return _read_json(folder / _CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackedError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise PackedError(f"{path}: not a mapping")
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_rest(source: Path, folder: Path, weight_map: Mapping[str, str]) -> None:
    """Copy what is no weight, and write the index where there is one."""
    weights = {file.name for file in weight_files(source)} | {_CONFIG, _INDEX}
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and str(relative) not in weights:
            (folder / relative.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
    if weight_files(source)[0].name != _SINGLE:
        index = _read_json(source / _INDEX)
        _write_json(folder / _INDEX, {**index, "weight_map": weight_map})
        size = sum(tensor_bytes(folder).values())
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
        _write_json(folder / _INDEX, {**index, "weight_map": weight_map})


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


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or entry.get("encoding") not in ENCODINGS:
        return False
    shape = entry.get("shape")
    return isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
