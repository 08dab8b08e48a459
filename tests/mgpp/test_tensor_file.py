"""Files written a tensor at a time are what safetensors reads, and writes itself."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mgpp.tensor_file import TensorFile, header_end, places, write_tensors

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


def write(path: Path, tensors: dict[str, Tensor], part: int = 7) -> None:
    """Write tensors in parts of at most so many values."""
    with path.open("wb") as stream:
        file = TensorFile(stream, {n: (t.dtype, t.shape) for n, t in tensors.items()}, {"a": "b"})
        for name in file.order:
            for values in tensors[name].reshape(-1).split(part):
                file.write(name, values)
        file.finish()


@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6))
def test_safetensors_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("file") / "m.safetensors"
    tensors = {
        f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)
    }
    write(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "b"}


def test_values_lie_where_the_header_says(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.randn(4, 5),
        "empty": torch.zeros(0, 2),
        "flags": torch.tensor([True, False]),
    }
    path = tmp_path / "m.safetensors"
    with path.open("wb") as stream:
        write_tensors(stream, tensors, part_bytes=7)
    assert all(torch.equal(values, tensors[name]) for name, values in load_file(path).items())
    content = path.read_bytes()
    found = places(content[: header_end(content)])
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tuple(tensor.shape))
    first, last = found["b"].bytes_of(6, 17)
    slice_of_b = torch.frombuffer(bytearray(content[first:last]), dtype=torch.float32)
    assert torch.equal(slice_of_b, tensors["b"].reshape(-1)[6:17])


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("b", torch.zeros(2, dtype=torch.int8), "values of b where those of a come next"),
        ("a", torch.zeros(2, dtype=torch.float16), "a is torch.float32, not torch.float16"),
        ("a", torch.zeros(5), "a has 4 values left, not 5"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, name: str, values: Tensor, why: str) -> None:
    with (tmp_path / "m").open("wb") as stream:
        file = TensorFile(stream, {"b": (torch.int8, [2]), "a": (torch.float32, [2, 2])})
        with pytest.raises(ValueError, match=why):
            file.write(name, values)
        file.write("a", torch.ones(3))
        with pytest.raises(ValueError, match="a is not whole: 1 values are missing"):
            file.finish()


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "m").open("wb") as stream, pytest.raises(ValueError, match=r"no torch\.qint8"):
        TensorFile(stream, {"a": (torch.qint8, [2])})
