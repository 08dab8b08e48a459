import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from mgpp import MixtureGaussianPrior, add_prior_grad_, log_prior
from mgpp.prior import shrink_
from mgpp.schedule import SlabProbAnnealing

SETTINGS = [(1e-10, 0.05, 0.1), (1e-10, 0.05, 1e-4), (1e-9, 0.1, 0.1), (1e-6, 0.01, 0.5)]


def magnitudes() -> torch.Tensor:
    grid = torch.cat([torch.zeros(1), torch.logspace(-9, 1, 4001), torch.linspace(0, 10, 4001)])
    return torch.cat([grid, -grid])


@pytest.mark.parametrize(("spike_var", "slab_var", "slab_prob"), SETTINGS)
def test_gradient_equals_autograd_of_the_log_prior_in_float64(spike_var, slab_var, slab_prob):
    prior = MixtureGaussianPrior(spike_var=spike_var, slab_var=slab_var)
    weight = magnitudes()
    grad = torch.zeros_like(weight)
    add_prior_grad_(grad, weight, prior=prior, slab_prob=slab_prob, num_examples=100)

    exact = weight.double().requires_grad_()
    (-log_prior(exact, prior, slab_prob).sum() / 100).backward()

    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad.double(), exact.grad, rtol=2e-5, atol=1e-9)


def test_log_prior_equals_the_mixture_of_torch_distributions():
    prior = MixtureGaussianPrior(spike_var=1e-4, slab_var=0.05)
    weight = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.2, 0.8], dtype=torch.float64)),
        torch.distributions.Normal(
            torch.zeros(2, dtype=torch.float64),
            torch.tensor([0.05, 1e-4], dtype=torch.float64).sqrt(),
        ),
    )
    torch.testing.assert_close(log_prior(weight, prior, 0.2), mixture.log_prob(weight))


def test_gradient_is_added_to_what_is_there_and_scales_with_the_number_of_examples():
    weight = torch.randn(200_000) * 1e-4  # several chunks
    prior = MixtureGaussianPrior()
    once, twice = torch.ones_like(weight), torch.zeros_like(weight)
    add_prior_grad_(once, weight, prior=prior, slab_prob=0.1, num_examples=10)
    add_prior_grad_(twice, weight, prior=prior, slab_prob=0.1, num_examples=20)
    torch.testing.assert_close((once - 1) / 2, twice, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("spike_var", "slab_var", "slab_prob"), SETTINGS)
def test_components_are_equally_likely_at_the_spike_threshold(spike_var, slab_var, slab_prob):
    prior = MixtureGaussianPrior(spike_var=spike_var, slab_var=slab_var)
    threshold = prior.spike_threshold(slab_prob)

    def density(var: float) -> float:
        return math.exp(-(threshold**2) / (2 * var)) / math.sqrt(2 * math.pi * var)

    assert slab_prob * density(slab_var) == pytest.approx((1 - slab_prob) * density(spike_var))


def test_spike_threshold_of_the_published_settings_is_about_one_adam_step():
    assert MixtureGaussianPrior().spike_threshold(0.1) == pytest.approx(4.9e-5, rel=0.02)


def test_no_spike_when_the_slab_is_likelier_everywhere():
    prior = MixtureGaussianPrior(spike_var=0.01, slab_var=0.011)
    assert prior.spike_threshold(0.999) == 0.0


@pytest.mark.parametrize("variances", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_variances_out_of_order_are_refused(variances):
    with pytest.raises(ValueError, match="0 < spike_var < slab_var"):
        MixtureGaussianPrior(spike_var=variances[0], slab_var=variances[1])


def test_bad_arguments_are_refused():
    prior, weight = MixtureGaussianPrior(), torch.zeros(4)
    with pytest.raises(ValueError, match="float32"):
        add_prior_grad_(weight, weight.bfloat16(), prior=prior, slab_prob=0.1, num_examples=1)
    with pytest.raises(ValueError, match="differ"):
        add_prior_grad_(weight, torch.zeros(5), prior=prior, slab_prob=0.1, num_examples=1)
    with pytest.raises(ValueError, match="num_examples"):
        add_prior_grad_(weight, weight.clone(), prior=prior, slab_prob=0.1, num_examples=0)
    with pytest.raises(ValueError, match="slab_prob"):
        prior.spike_threshold(1.0)
    with pytest.raises(ValueError, match="final_factor"):
        SlabProbAnnealing(slab_prob=0.5, final_factor=0.0)


@pytest.mark.parametrize("slab_prob", [0.3, 0.1, 1e-4])
@pytest.mark.parametrize("threshold", [1e-6, 4.94e-5, 1e-3, 0.1])
def test_the_prior_with_a_threshold_has_it(threshold, slab_prob):
    prior = MixtureGaussianPrior.with_threshold(threshold, slab_var=0.05, slab_prob=slab_prob)
    spike, slab = (
        prob * math.exp(-(threshold**2) / (2 * var)) / math.sqrt(2 * math.pi * var)
        for prob, var in ((1 - slab_prob, prior.spike_var), (slab_prob, 0.05))
    )
    assert spike == pytest.approx(slab, rel=1e-4)


@pytest.mark.parametrize(("threshold", "slab_prob"), [(1e-3, 0.9999), (0.3, 0.1), (50.0, 0.1)])
def test_a_threshold_that_cannot_be_had_is_refused(threshold, slab_prob):
    with pytest.raises(ValueError, match="cannot be had with slab_var"):
        MixtureGaussianPrior.with_threshold(threshold, slab_var=0.05, slab_prob=slab_prob)


@pytest.mark.parametrize("step_size", [1e-12, 1e-9, 1e-4])
@pytest.mark.parametrize("start", [3e-6, 4e-5, 6e-5, 0.02, -0.3])
def test_shrinking_minimizes_the_prior_s_parabola_and_the_distance(start, step_size):
    """At w the parabola touches -log pi: its curvature is the slope there over w."""
    prior = MixtureGaussianPrior(spike_var=1e-10, slab_var=0.05)
    exact = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    (-log_prior(exact, prior, 0.1)).backward()
    curvature = float(exact.grad) / start

    def surrogate(scale):  # in units of the start, so that the search is well conditioned
        moved = scale * start
        return (curvature * moved**2 / 2 + (moved - start) ** 2 / (2 * step_size)) / start**2

    best = minimize_scalar(surrogate, bounds=(-1, 2), method="bounded", options={"xatol": 1e-12})
    weight = torch.full((200_000,), start)  # several chunks
    shrink_(weight, prior=prior, slab_prob=0.1, step_size=step_size)
    assert weight.unique().numel() == 1
    assert float(weight[0]) / start == pytest.approx(best.x, rel=2e-4, abs=1e-6)


def test_a_small_step_of_shrinking_is_a_step_down_the_gradient():
    prior = MixtureGaussianPrior(spike_var=1e-6, slab_var=0.05)
    weight = torch.linspace(-0.01, 0.01, 1001)
    grad, shrunk = torch.zeros_like(weight), weight.clone()
    add_prior_grad_(grad, weight, prior=prior, slab_prob=0.1, num_examples=1)
    shrink_(shrunk, prior=prior, slab_prob=0.1, step_size=1e-9)
    torch.testing.assert_close(shrunk, weight - 1e-9 * grad, rtol=1e-5, atol=1e-9)


def test_shrinking_never_passes_zero_and_keeps_zeros():
    weight = magnitudes()
    shrunk = weight.clone()
    shrink_(shrunk, prior=MixtureGaussianPrior(), slab_prob=0.1, step_size=1e3)
    assert torch.equal(shrunk.sign(), weight.sign())
    assert (shrunk.abs() <= weight.abs()).all()


def test_what_cannot_be_shrunk_is_refused():
    prior = MixtureGaussianPrior()
    with pytest.raises(ValueError, match=r"float32 master weights, got torch\.bfloat16"):
        shrink_(torch.ones(1, dtype=torch.bfloat16), prior=prior, slab_prob=0.1, step_size=1.0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        shrink_(torch.ones(1), prior=prior, slab_prob=0.1, step_size=-1.0)
