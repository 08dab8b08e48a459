"""The mixture-Gaussian prior of MGPP: its density, its gradient and its spike threshold.

Source: Zhang, Sun, Liang, "Magnitude Pruning of Large Pretrained Transformer Models with a Mixture
Gaussian Prior", arXiv 2411.00969. The paper's sigma_0^2 and sigma_1^2 are `spike_var` and `slab_var`
here, its lambda is `slab_prob`. All three are plain numbers: variances, never standard deviations.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.kernels.devices import chunks

# Below this P(spike|w) is 0 to float32 beside the slab's pull. Most weights lie far below, where the
# exponential overflows, which costs twice the time.
_LEAST_LOG_ODDS = -80.0


@dataclass(frozen=True, kw_only=True)
class MixtureGaussianPrior:
    """pi(w) = slab_prob N(0, slab_var) + (1 - slab_prob) N(0, spike_var) for every prunable weight.

    Attributes:
        spike_var: variance of the narrow component, which holds the weights to be pruned.
        slab_var: variance of the wide component, which holds the weights that stay.

    Raises:
        ValueError: unless 0 < spike_var < slab_var.
    """

    spike_var: float = 1e-10
    slab_var: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.spike_var < self.slab_var < math.inf:
            raise ValueError(
                f"need 0 < spike_var < slab_var, got spike_var={self.spike_var!r}, "
                f"slab_var={self.slab_var!r}"
            )

    def log_odds_terms(self, slab_prob: float) -> tuple[float, float]:
        """Return (a, b) such that log P(slab|w) - log P(spike|w) = a + b w^2."""
        _check_slab_prob(slab_prob)
        constant = math.log(slab_prob / (1 - slab_prob)) + 0.5 * math.log(
            self.spike_var / self.slab_var
        )
        return constant, 1 / (2 * self.spike_var) - 1 / (2 * self.slab_var)

    @classmethod
    def with_threshold(
        cls, threshold: float, *, slab_var: float, slab_prob: float
    ) -> "MixtureGaussianPrior":
        """Return the prior whose spike threshold is `threshold`.

        Args:
            threshold: w*, an absolute magnitude.
            slab_var: variance of the wide component.
            slab_prob: at which the threshold is meant; annealing moves it from there.

        Raises:
            ValueError: if it is not below the slab's standard deviation, or no spike_var gives it.
        """
        low, high = math.log(1e-38), math.log(slab_var)
        for _ in range(200):  # w* rises with spike_var up to near slab_var
            middle = (low + high) / 2
            found = cls(spike_var=math.exp(middle), slab_var=slab_var).spike_threshold(slab_prob)
            low, high = (middle, high) if found < threshold else (low, middle)
        prior = cls(spike_var=math.exp(low), slab_var=slab_var)
        is_met = math.isclose(prior.spike_threshold(slab_prob), threshold, rel_tol=1e-6)
        if not is_met or threshold >= math.sqrt(slab_var):
            raise ValueError(
                f"a spike threshold of {threshold:.3g} cannot be had with slab_var={slab_var} and "
                f"slab_prob={slab_prob}: it must be below {math.sqrt(slab_var):.3g}, and slab_prob small"
            )
        return prior

    def spike_threshold(self, slab_prob: float) -> float:
        """Return w*, the magnitude at which spike and slab are equally likely (0 if none is)."""
        constant, slope = self.log_odds_terms(slab_prob)
        return math.sqrt(max(-constant, 0.0) / slope)


def log_prior(weight: Tensor, prior: MixtureGaussianPrior, slab_prob: float) -> Tensor:
    """Return log pi(w) for each element, in the dtype of `weight` (the tests use float64)."""
    _check_slab_prob(slab_prob)
    log_two_pi = math.log(2 * math.pi)
    parts = [
        math.log(prob) - 0.5 * (log_two_pi + math.log(var)) - weight.square() / (2 * var)
        for prob, var in ((slab_prob, prior.slab_var), (1 - slab_prob, prior.spike_var))
    ]
    return torch.logaddexp(*parts)


@torch.no_grad()
def add_prior_grad_(
    grad: Tensor,
    weight: Tensor,
    *,
    prior: MixtureGaussianPrior,
    slab_prob: float,
    num_examples: int,
) -> None:
    """Add -(1/n) d log pi(w) / dw to `grad`, in place.

    g(w) = (w / n) [P(spike|w) / spike_var + P(slab|w) / slab_var]

    P(spike|w) is taken as a sigmoid of the negative log-odds, because the odds themselves overflow
    float32 for ordinary weights; P(slab|w) as its complement. Both terms are positive, so nothing
    cancels: where P(slab|w) loses its relative precision the spike's term is some 1e8 times larger.

    Args:
        grad: float32, 1-D, the loss gradient at these weights; changed in place.
        weight: float32, same shape and device: the master weights, not a low-precision copy.
        prior: the two variances.
        slab_prob: prior probability of the slab at this step.
        num_examples: n, the number of TRAINING EXAMPLES (not tokens, not steps).

    Raises:
        ValueError: if dtypes are not float32, shapes differ, or n < 1.
    """
    if grad.dtype != torch.float32 or weight.dtype != torch.float32:
        raise ValueError(
            f"the prior needs float32 master weights and gradients, got {weight.dtype} and "
            f"{grad.dtype}: at lower precision the pull inside the spike is lost"
        )
    if grad.shape != weight.shape:
        raise ValueError(f"grad {tuple(grad.shape)} and weight {tuple(weight.shape)} differ")
    if not num_examples >= 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    constant, slope = prior.log_odds_terms(slab_prob)
    spike_pull = (1 / prior.spike_var - 1 / prior.slab_var) / num_examples
    slab_pull = 1 / prior.slab_var / num_examples
    if grad.is_cuda:
        from mgpp.kernels.prior import add_prior_grad_fused_

        add_prior_grad_fused_(
            grad,
            weight,
            constant=constant,
            slope=slope,
            spike_pull=spike_pull,
            slab_pull=slab_pull,
        )
        return
    # By chunks that is no slower on a CPU than one pass fused by inductor (5.3M weights on one core: 12
    # ms against 15), and needs no compiler.
    for g, w in zip(chunks(grad), chunks(weight), strict=True):
        g.addcmul_(w, _spike_share(w, constant, slope), value=spike_pull).add_(w, alpha=slab_pull)


@torch.no_grad()
def shrink_(
    weight: Tensor, *, prior: MixtureGaussianPrior, slab_prob: float, step_size: float
) -> None:
    """Take one proximal step of the prior alone, in place.

    w / (1 + step_size [P(spike|w) / spike_var + P(slab|w) / slab_var])

    With P(spike|w) held fixed, as in a step of expectation maximization, -log pi is at most a parabola in
    w; this is what minimizes that parabola plus (w' - w)^2 / (2 step_size). Unlike a gradient step it
    never overshoots zero, however strong the prior.

    Args:
        weight: float32, 1-D, the master weights; changed in place.
        prior: the two variances.
        slab_prob: prior probability of the slab at this step.
        step_size: the learning rate over the number of training examples.

    Raises:
        ValueError: if the dtype is not float32, or the step is negative.
    """
    if weight.dtype != torch.float32:
        raise ValueError(f"the prior needs float32 master weights, got {weight.dtype}")
    if not step_size >= 0:
        raise ValueError(f"step_size must not be negative, got {step_size}")
    constant, slope = prior.log_odds_terms(slab_prob)
    spike_rate = step_size * (1 / prior.spike_var - 1 / prior.slab_var)
    slab_rate = step_size / prior.slab_var
    for w in chunks(weight):
        w.div_(_spike_share(w, constant, slope).mul_(spike_rate).add_(1 + slab_rate))


def _spike_share(weight: Tensor, constant: float, slope: float) -> Tensor:
    """Return P(spike|w) for weights of one chunk."""
    minus_constant = torch.tensor(-constant, dtype=torch.float32, device=weight.device)
    log_odds = torch.addcmul(minus_constant, weight, weight, value=-slope)
    return log_odds.clamp_min_(_LEAST_LOG_ODDS).sigmoid_()


def _check_slab_prob(slab_prob: float) -> None:
    if not 0 < slab_prob < 1:
        raise ValueError(f"slab_prob must lie strictly between 0 and 1, got {slab_prob!r}")
