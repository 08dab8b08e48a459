"""Chunks: every thread has a part of one, however many there are, and masks can be cut along them."""

import pytest
import torch

from mgpp import MixtureGaussianPrior, add_prior_grad_
from mgpp.kernels import devices
from tests.mgpp.operations import counted

CPU, GRAIN = (
    torch.device("cpu"),
    1 << 15,
)  # what torch gives a thread at least (at::internal::GRAIN_SIZE)


@pytest.mark.parametrize("num_threads", [1, 2, 4, 5, 64])
def test_every_thread_has_a_part_of_a_chunk(monkeypatch, num_threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    assert devices.chunk_size(CPU) >= num_threads * GRAIN
    assert devices.chunk_size(CPU) % 8 == 0


def test_the_prior_on_a_cpu_has_fewer_and_larger_chunks_the_more_threads(monkeypatch):
    """Its operations are those of one chunk where the threads together take all weights."""

    def operations(num_threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
        weight, grad = torch.ones(1 << 21), torch.zeros(1 << 21)
        with counted() as counts:
            add_prior_grad_(
                grad, weight, prior=MixtureGaussianPrior(), slab_prob=0.1, num_examples=1
            )
        return counts.operations.total()

    of_one_chunk = operations(16)
    assert [operations(1), operations(2)] == [16 * of_one_chunk, 8 * of_one_chunk]
