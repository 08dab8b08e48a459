"""What is done to a good folder of a model, to make it one that must not be trained."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CLASSIFIER = "model.safetensors", "AutoModelForSequenceClassification"
Tensors = dict[str, torch.Tensor]


def changed(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Return what rewrites a folder's weights."""

    def rewrite(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return rewrite


def written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(name: str, left_out: int) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-left_out])

    return rewrite


def settings(**values: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return rewrite


def as_pickle(value: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(value))

    return rewrite


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


class Code:
    """Something that a pickle runs as it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)
