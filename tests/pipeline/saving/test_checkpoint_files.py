"""Tensors read by parts are those that safetensors reads whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import DamagedFileError
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
    reader = TensorReader(str(folder))
    assert reader.specs == {n: Spec(t.dtype, tuple(t.shape)) for n, t in TENSORS.items()}
    for name, tensor in reversed(TENSORS.items()):
        parts = [tensor.new_empty(0), *reader.parts(name)]
        assert all(part.dim() == 1 and part.dtype == tensor.dtype for part in parts)
        assert torch.equal(torch.cat(parts), tensor.reshape(-1))
        if name == "a.matrix":
            assert len(parts) - 1 == {1: 37 * 11, 60: 28, 10**6: 1}[size]


def test_a_file_that_is_cut_off_is_named(folder):
    path = folder / file_names(2)[0]
    reader = TensorReader(str(folder))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=f"{path.name} is cut off"):
        list(reader.parts("a.half"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DamagedFileError, match=f"{path.name} is cut off: it has 20 bytes"):
        TensorReader(str(folder))


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
