"""Tensors read by parts are those that safetensors reads whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pipeline.saving import checkpoint_files
from pipeline.saving.checkpoint_files import TensorReader, file_names, write_index
from pipeline.saving.contents import Spec

TENSORS = {
    "a.matrix": torch.randn(37, 11),
    "a.half": torch.randn(5, 3, 2).bfloat16(),
    "b.line": torch.arange(50),
    "b.scalar": torch.tensor(1.5),
    "b.nothing": torch.zeros(0, 4),
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two files."""
    names = file_names(2)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {}
    for start, name in zip("ab", names, strict=True):
        held = {n: t for n, t in TENSORS.items() if n.startswith(start)}
        save_file(held, tmp_path / name)
        files[name] = {n: Spec(t.dtype, tuple(t.shape)) for n, t in held.items()}
    write_index(tmp_path, files)
    return tmp_path


@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_parts_are_the_tensor_in_order(folder, monkeypatch, size):
    monkeypatch.setattr(checkpoint_files, "PART_BYTES", size)
    monkeypatch.setattr(checkpoint_files, "_MAPPED_BYTES", 3 * size)
    reader = TensorReader(folder)
    assert reader.specs == {n: Spec(t.dtype, tuple(t.shape)) for n, t in TENSORS.items()}
    for name, tensor in reversed(TENSORS.items()):
        parts = list(reader.parts(name))
        assert all(part.dim() == 1 and part.dtype == tensor.dtype for part in parts)
        assert torch.equal(torch.cat(parts), tensor.reshape(-1))
        if name == "a.matrix":
            assert len(parts) == {1: 37, 60: 37, 10**6: 1}[size]


def test_the_index_says_where_tensors_are_and_how_large_all_is(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["a.half"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in TENSORS.values()),
        "total_size": sum(t.nbytes for t in TENSORS.values()),
    }


def test_one_file_has_no_index(tmp_path):
    write_index(tmp_path, {name: {} for name in file_names(1)})
    assert not list(tmp_path.iterdir())
