"""The files of a model's folder: whether they are whole, and hold tensors alone, of which dtypes."""

import json
import zipfile
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import DamagedFileError

_MOST_READ = 1 << 30  # bytes of files that are read for a look at their values
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INTEGER = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}
_TEXTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads a model's weights from, the index left out.

    Raises:
        DamagedFileError: if the index is damaged, or names a file that is not there.
    """
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(_json(index)["weight_map"].values()))
            except (KeyError, TypeError, AttributeError) as error:
                raise DamagedFileError(f"{index.name} is damaged: it has no weight_map") from error
            for part in names:
                if not (folder / part).is_file():
                    raise DamagedFileError(f"{index.name} names {part}, which is not there")
            return [folder / part for part in names]
    return []


def integer_tensors(folder: Path) -> list[str]:
    """Return the names of the tensors of whole numbers in a folder's weights; reads headers alone.

    Raises:
        DamagedFileError: if a file is empty, cut off, damaged, or holds more than tensors.
    """
    found = []
    for path in weight_files(folder):
        if not path.stat().st_size:
            raise DamagedFileError(f"{path.name} is empty")
        if path.suffix == ".safetensors":
            found += _integers_of_safetensors(path)
        else:
            found += _integers_of_pickle(path)
    return sorted(found)


def count_zeros(folder: Path, names: Collection[str]) -> int | None:
    """Return how many weights of some matrices are zero; reads no more than 1 GiB.

    Args:
        folder: of a model.
        names: of its matrices; in the files they may have, or lack, the prefix of a base model.

    Returns:
        None where the files do not tell: larger ones, ones that are no safetensors, packed ones, ones of
        other names.
    """
    files = weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        return None
    if sum(path.stat().st_size for path in files) > _MOST_READ:
        return None
    ends = {f".{name}" for name in names}
    seen = zeros = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118
                if any(stored.endswith(end) or end.endswith(f".{stored}") for end in ends):
                    values = file.get_tensor(stored)
                    if values.dim() < 2:
                        return None
                    zeros += int((values == 0).sum())
                    seen += 1
    return zeros if seen == len(ends) else None


def check_texts(folder: Path) -> None:
    """Check the JSON files of a model and its tokenizer.

    Raises:
        DamagedFileError: naming the first one that is not JSON.
    """
    for name in _TEXTS:
        if (folder / name).is_file():
            _json(folder / name)


def _json(path: Path) -> dict[str, Any]:
    if not path.stat().st_size:
        raise DamagedFileError(f"{path.name} is empty")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 either
        raise DamagedFileError(f"{path.name} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path.name} is damaged: it holds no JSON object")
    return values


def _integers_of_safetensors(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return [n for n in file.keys() if file.get_slice(n).get_dtype() in _INTEGER]  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFileError(f"{path.name} is damaged or cut off: {error}") from error


def _integers_of_pickle(path: Path) -> list[str]:
    try:
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except UnpicklingError as error:
        raise DamagedFileError(
            f"{path.name} is no plain file of tensors: loading it could run code"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise DamagedFileError(
            f"{path.name} is damaged or cut off: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(tensors, dict):
        raise DamagedFileError(f"{path.name} holds a {type(tensors).__name__}, not named tensors")
    return [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point()
    ]
