"""The kernel for GPUs against autograd in float64; without a GPU, Triton's own interpreter runs it."""

import importlib.util

import pytest
import torch

from mgpp import MixtureGaussianPrior, log_prior

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; torch's builds for GPUs bring it",
)
NUM_EXAMPLES, SLAB_PROB = 500, 0.1


@pytest.fixture
def kernel():
    from mgpp.kernels.prior import add_prior_grad_fused_

    return add_prior_grad_fused_


@pytest.mark.parametrize("spike_var", [1e-10, 1e-6])
@pytest.mark.parametrize(("start", "numel"), [(0, 1), (0, 1024), (3, 2500), (1, 4097)])
def test_the_kernel_equals_autograd(kernel, start, numel, spike_var):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = MixtureGaussianPrior(spike_var=spike_var, slab_var=0.05)
    generator = torch.Generator().manual_seed(numel)
    # Magnitudes from far inside the spike to the tail of the slab, and zeros.
    scale = torch.logspace(-9, 0.5, start + numel + 5)[
        torch.randperm(start + numel + 5, generator=generator)
    ]
    whole = torch.randn(start + numel + 5, generator=generator) * scale
    whole[::7] = 0.0
    grads = torch.randn(start + numel + 5, generator=generator)
    weight = whole.to(device)[start : start + numel]
    found = grads.clone().to(device)
    constant, slope = prior.log_odds_terms(SLAB_PROB)
    kernel(
        found[start : start + numel],
        weight,
        constant=constant,
        slope=slope,
        spike_pull=(1 / prior.spike_var - 1 / prior.slab_var) / NUM_EXAMPLES,
        slab_pull=1 / prior.slab_var / NUM_EXAMPLES,
    )
    exact = whole[start : start + numel].double().requires_grad_()
    (-log_prior(exact, prior, SLAB_PROB).sum() / NUM_EXAMPLES).backward()
    expected = grads.double().clone()
    expected[start : start + numel] += exact.grad
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-5, atol=1e-6)
    assert torch.equal(found.cpu()[:start], grads[:start])
    assert torch.equal(found.cpu()[start + numel :], grads[start + numel :])
