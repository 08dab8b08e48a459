import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mgpp.sharding.bitmask import (
    all_kept,
    count_bits,
    num_bytes,
    pack_bits,
    slice_bits,
    unpack_bits,
)


@given(st.lists(st.booleans(), max_size=100))
def test_round_trip_and_layout(bits):
    keep = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(keep)
    assert packed.numel() == num_bytes(len(bits))
    assert np.array_equal(packed.numpy(), np.packbits(keep.numpy(), bitorder="little"))
    assert torch.equal(unpack_bits(packed, len(bits)), keep)
    assert count_bits(packed) == sum(bits)


@given(st.integers(0, 100))
def test_all_kept(numel):
    packed = all_kept(numel, torch.device("cpu"))
    assert count_bits(packed) == numel
    assert unpack_bits(packed, numel).all()


def test_wrong_sizes_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="2 bytes"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="bool"):
        pack_bits(torch.zeros(8))
    with pytest.raises(ValueError, match="uint8"):
        count_bits(torch.zeros(8, dtype=torch.int32))


@given(st.lists(st.booleans(), min_size=1, max_size=100), st.data())
def test_a_slice_is_that_of_the_bits(bits, data):
    start = data.draw(st.integers(0, len(bits)))
    numel = data.draw(st.integers(0, len(bits) - start))
    keep = torch.tensor(bits, dtype=torch.bool)
    found = slice_bits(pack_bits(keep), start, numel)
    assert torch.equal(found, pack_bits(keep[start : start + numel]))
