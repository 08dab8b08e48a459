"""Sparse linear layers against the dense ones they replace."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mgpp.sparse.linear import SparseLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")


def make_pair(sparsity=0.9, *, bias=True, block=32, out=48, width=64):
    dense = nn.Linear(width, out, bias=bias)
    dense.weight.data[torch.rand(dense.weight.shape) < sparsity] = 0
    return dense, SparseLinear(dense.weight, dense.bias, block=block)


@pytest.mark.parametrize(
    "shape", [(64,), (1, 64), (2, 64), (16, 64), (3, 50, 64), (0, 64), (2, 0, 64)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_the_product_is_that_of_the_dense_layer(shape, bias, sparsity):
    dense, sparse = make_pair(sparsity, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        expected, found = dense(x), sparse(x)
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-30)


def test_empty_rows_and_one_column():
    dense = nn.Linear(1, 3)
    dense.weight.data[1] = 0
    sparse = SparseLinear(dense.weight, dense.bias, block=4)
    x = torch.randn(7, 1)
    assert torch.allclose(sparse(x), dense(x))


def test_inputs_that_are_no_plain_rows():
    dense, sparse = make_pair()
    x = torch.randn(64, 40).t()
    assert torch.allclose(sparse(x), dense(x), atol=1e-6)
    assert torch.allclose(sparse(x[::3]), dense(x[::3]), atol=1e-6)


def test_its_state_is_that_of_the_dense_layer():
    dense, sparse = make_pair()
    assert {n: v.tolist() for n, v in sparse.state_dict().items()} == {
        n: v.tolist() for n, v in dense.state_dict().items()
    }
    other, _ = make_pair(0.5)
    sparse.load_state_dict(other.state_dict())
    x = torch.randn(5, 64)
    assert torch.allclose(sparse(x), other(x), atol=1e-6)


def test_a_conv1d_keeps_its_weight_the_other_way_round():
    dense = Conv1D(48, 64)
    dense.weight.data[torch.rand(64, 48) < 0.9] = 0
    sparse = SparseLinear(dense.weight.t(), dense.bias, block=8, transposed=True)
    x = torch.randn(3, 20, 64)
    assert torch.allclose(sparse(x), dense(x), atol=1e-6)
    assert torch.equal(sparse.state_dict()["weight"], dense.weight)
    sparse.load_state_dict(dense.state_dict())
    assert torch.allclose(sparse(x), dense(x), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.update(weight=torch.zeros(3, 3)), "size mismatch for weight: "),
        (lambda s: s.pop("weight"), "Missing key.*weight"),
        (lambda s: s.update(more=torch.zeros(1)), "Unexpected key.*more"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, why):
    dense, sparse = make_pair()
    state = dense.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=why):
        sparse.load_state_dict(state)


def test_it_is_copied_saved_and_run_by_threads():
    dense, sparse = make_pair()
    x = torch.randn(40, 64)
    expected = dense(x)
    assert torch.allclose(copy.deepcopy(sparse)(x), expected, atol=1e-6)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    assert torch.allclose(torch.load(buffer, weights_only=False)(x), expected, atol=1e-6)
    found = [None] * 8

    def run(i):
        with torch.inference_mode():
            found[i] = sparse(x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_gradient_is_refused():
    _, sparse = make_pair()
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="is for inference"):
        sparse(x)
    with torch.no_grad():
        assert sparse(x).shape == (2, 48)
