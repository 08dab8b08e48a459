"""Checkpoints as they lie in a folder, packed or plain: their configuration, files and tensors."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgpp.sparse.packing import ENCODINGS, Encoding, unpack

QUANT_METHOD = "mgpp-packed"
VERSION = 1
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class PackedError(ValueError):
    """A checkpoint that cannot be packed or unpacked; says which file or tensor, and why."""


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
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise PackedError(f"{folder} has neither {SINGLE} nor {INDEX}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise PackedError(f"{index} is damaged: it has no weight_map of file names")
    return [folder / name for name in sorted(set(names.values()))]


def config_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `config.json`.

    Raises:
        PackedError: if there is none, or it is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise PackedError(f"{folder} is no checkpoint: it has no {CONFIG}")
    return read_json(folder / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        PackedError: if it holds none, or cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackedError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise PackedError(f"{path}: not a mapping")
    return found


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or entry.get("encoding") not in ENCODINGS:
        return False
    shape = entry.get("shape")
    return isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
