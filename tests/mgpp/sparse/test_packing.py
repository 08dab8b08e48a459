"""Packed tensors against the tensors, and their sizes against counting by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mgpp.sparse import packing
from mgpp.sparse.packing import ENCODINGS, layout_of, pack, unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)


def bits(tensor):
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    sparsity = draw(st.sampled_from([0.0, 0.3, 0.9, 0.99, 0.999, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < sparsity] = 0
    return values.to(draw(st.sampled_from(DTYPES)))


@given(tensors(), st.sampled_from(ENCODINGS), st.sampled_from([8, 64, 1 << 22]))
def test_a_packed_tensor_comes_back_bit_for_bit(tensor, encoding, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PART", part)
        values, positions = pack(tensor, encoding)
        assert torch.equal(bits(unpack(values, positions, encoding, tensor.shape)), bits(tensor))
        layout = layout_of(tensor)
        smaller = [pack(tensor, each) for each in ENCODINGS]
    assert positions.dtype == torch.uint8
    sizes = [v.nbytes + p.nbytes for v, p in smaller]
    assert layout.num_bytes(tensor.itemsize) == min(sizes)
    chosen = smaller[ENCODINGS.index(layout.encoding)]
    assert (layout.num_values, layout.num_positions) == (len(chosen[0]), len(chosen[1]))


def test_negative_zero_and_nan_are_values():
    tensor = torch.tensor([[0.0, -0.0, math.nan, 0.0, math.inf, 1e-45]])
    for encoding in ENCODINGS:
        values, positions = pack(tensor, encoding)
        assert len(values) == 4
        assert torch.equal(bits(unpack(values, positions, encoding, (1, 6))), bits(tensor))


@pytest.mark.parametrize("zeros", [0, 254, 255, 256, 257, 511, 512, 1000])
def test_gaps_of_every_length(zeros):
    tensor = torch.zeros(2 * zeros + 2)
    tensor[zeros], tensor[2 * zeros + 1] = 1.0, 2.0
    values, positions = pack(tensor, "gaps")
    assert len(values) == len(positions) == 2 * (1 + zeros // 256)
    assert torch.equal(unpack(values, positions, "gaps", (len(tensor),)), tensor)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_is_that_of_the_values_and_one_bit(sparsity, dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(256, 256, generator=generator).abs_().add_(0.1)
    tensor.view(-1)[
        torch.randperm(tensor.numel(), generator=generator)[: int(65536 * sparsity)]
    ] = 0
    tensor = tensor.to(dtype)
    packed = layout_of(tensor).num_bytes(tensor.itemsize) / tensor.nbytes
    assert packed <= (1 - sparsity) + 1 / (8 * tensor.itemsize) + 0.001
    if sparsity >= 0.95:
        assert layout_of(tensor).encoding == "gaps"
        assert packed < (1 - sparsity) * (1 + 1 / tensor.itemsize) * 1.1 + 0.007


@pytest.mark.parametrize(
    ("encoding", "values", "positions", "shape", "why"),
    [
        ("bitmask", 2, [3, 0], (3, 9), "a bitmask of 2 bytes for 27 elements"),
        ("bitmask", 3, [3, 0], (3, 5), "a bitmask of 2 values, of which there are 3"),
        ("bitmask", 2, [3], (3, 5), "a bitmask of 1 bytes for 15 elements"),
        ("bitmask", 2, [1, 0x80], (3, 5), "bits beyond its 15 elements"),
        ("gaps", 2, [0], (3, 5), "2 values have 1 gaps"),
        ("gaps", 2, [10, 10], (3, 5), r"gaps lead beyond the 15 elements of \[3, 5\]"),
        ("gaps", 2, [10, 2], (3, 5), r"gaps lead to 14 of the 15 elements of \[3, 5\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(encoding, values, positions, shape, why):
    with pytest.raises(ValueError, match=why):
        unpack(torch.ones(values), torch.tensor(positions, dtype=torch.uint8), encoding, shape)
