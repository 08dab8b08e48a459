"""Fingerprints of weights: of their bytes, whatever the sign of a zero."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.models.weights import Fingerprint, fingerprints, positive_zeros

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def fingerprint(tensor, prunable=()):
    return fingerprints([("w", tensor)], prunable)["w"]


def test_the_fingerprint_is_of_shape_dtype_and_bytes():
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert fingerprint(torch.from_numpy(values)) == {
        "shape": [5, 3],
        "dtype": "float32",
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, np.bool_])
def test_the_fingerprint_of_other_dtypes(dtype):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    found = fingerprint(torch.from_numpy(values))
    assert found["sha256"] == hashlib.sha256(values.tobytes()).hexdigest()
    assert found["dtype"] == np.dtype(dtype).name


def test_the_fingerprint_of_bfloat16_is_of_its_two_bytes():
    values = torch.tensor([1.0, -2.5, 0.0, 3.0e38])
    # bfloat16 is the upper half of float32, and these values need no more.
    upper = (values.to(torch.bfloat16).float().numpy().view(np.uint32) >> 16).astype(np.uint16)
    found = fingerprint(values.to(torch.bfloat16))
    assert found["sha256"] == hashlib.sha256(upper.tobytes()).hexdigest()
    assert found["dtype"] == "bfloat16"


def test_the_layout_in_memory_changes_nothing():
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert fingerprint(values.t()) == fingerprint(values.t().contiguous())
    assert fingerprint(values[:, ::2]) == fingerprint(values[:, ::2].clone())
    assert fingerprint(nn.Parameter(values)) == fingerprint(values)


def test_scalars_and_empty_tensors_have_fingerprints():
    scalar = np.float32(1.5)
    assert fingerprint(torch.tensor(1.5))["sha256"] == hashlib.sha256(scalar.tobytes()).hexdigest()
    assert fingerprint(torch.zeros(0, 3))["sha256"] == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zeros_equal_zeros(dtype):
    signed = torch.tensor([1.0, -0.0, 0.0, -2.0], dtype=dtype)
    unsigned = torch.tensor([1.0, 0.0, 0.0, -2.0], dtype=dtype)
    assert fingerprint(signed, ["w"]) == fingerprint(unsigned, ["w"])
    assert torch.signbit(signed[1])  # the tensor itself is left as it was


def test_a_single_bit_changes_the_fingerprint():
    values = torch.ones(100)
    changed = values.clone()
    changed[50] = torch.nextafter(changed[50], torch.tensor(2.0))
    assert fingerprint(values)["sha256"] != fingerprint(changed)["sha256"]
    same_bytes = [fingerprint(values.view(shape)) for shape in ((10, 10), (4, 25))]
    assert same_bytes[0]["sha256"] == same_bytes[1]["sha256"]
    assert same_bytes[0] != same_bytes[1]


def test_zeros_are_counted_for_prunable_weights_only():
    tensors = {
        "a": torch.tensor([[0.0, -0.0, 1.0], [1e-45, 0.0, -1.0]]),
        "b": torch.zeros(3),
        "c": torch.ones(2),
    }
    found = fingerprints(tensors.items(), ["a", "c"])
    assert list(found) == ["a", "b", "c"]
    assert found["a"]["zeros"] == 3
    assert "zeros" not in found["b"]
    assert found["c"]["zeros"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_positive_zeros_touch_nothing_else(dtype):
    smallest = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), smallest, -smallest]
    before = torch.tensor(values, dtype=dtype)
    after = positive_zeros(before)
    assert after.dtype == dtype
    assert not torch.signbit(after[after == 0]).any()
    assert torch.equal(after.nan_to_num(7), before.nan_to_num(7))
    assert torch.signbit(after[3])
    assert torch.signbit(after[8])


def test_positive_zeros_keep_the_smallest_numbers():
    denormals = torch.tensor([1e-45, -1e-45, 1e-40])
    assert positive_zeros(denormals).view(torch.int32).tolist() == (
        denormals.view(torch.int32).tolist()
    )


def test_positive_zeros_leave_integers_alone():
    values = torch.tensor([0, -3, 5])
    assert torch.equal(positive_zeros(values), values)
    assert positive_zeros(torch.tensor([True, False])).dtype == torch.bool


@given(st.lists(st.integers(0, 9), max_size=8))
def test_a_fingerprint_taken_in_parts_is_that_of_the_whole(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    whole = torch.randint(-1, 2, (sum(sizes),), generator=generator).float()
    in_parts = Fingerprint(count_zeros=True)
    for part in whole.split(sizes):
        in_parts.update(part)
    assert in_parts.entry(whole.shape, whole.dtype) == fingerprint(whole, ["w"])
