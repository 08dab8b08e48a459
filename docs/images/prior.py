"""Draws prior.png: the prior's pull against |w|. `python docs/images/prior.py` from the repository."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from mgpp import MixtureGaussianPrior, add_prior_grad_

SLAB_VAR, SLAB_PROB = 0.05, 0.1
PUBLISHED = MixtureGaussianPrior(spike_var=1e-10, slab_var=SLAB_VAR)


def pull(magnitude: torch.Tensor, prior: MixtureGaussianPrior, slab_prob: float) -> torch.Tensor:
    """Return n times the prior's gradient at each magnitude; what Adam sees is this over n."""
    grad = torch.zeros_like(magnitude)
    add_prior_grad_(grad, magnitude, prior=prior, slab_prob=slab_prob, num_examples=1)
    return grad


def main() -> None:
    """Draw both panels."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    magnitude = torch.logspace(-7, 0, 2000)
    for slab_prob, label in ((SLAB_PROB, "at the start (0.1)"), (1e-4, "at the end (0.0001)")):
        (line,) = left.plot(
            magnitude, pull(magnitude, PUBLISHED, slab_prob), label=f"slab_prob {label}"
        )
        left.axvline(
            PUBLISHED.spike_threshold(slab_prob), linestyle=":", color=line.get_color(), linewidth=1
        )
    left.set_xlabel("|w|")
    left.set_title("spike_var 1e-10, slab_var 0.05; dotted: spike threshold w*")
    rate = 5e-5
    in_rates = torch.logspace(-2, 2, 2000)
    for times in (0.3, 1.0, 3.0):
        prior = MixtureGaussianPrior.with_threshold(
            times * rate, slab_var=SLAB_VAR, slab_prob=SLAB_PROB
        )
        right.plot(
            in_rates,
            pull(in_rates * rate, prior, SLAB_PROB),
            label=f"spike_threshold {times:g}: spike_var {prior.spike_var:.1e}",
        )
    right.axvline(1, color="grey", linestyle="--", linewidth=1, label="one step of Adam")
    right.set_xlabel("|w| in learning rates (5e-5)")
    right.set_title("the same pull for three thresholds")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylabel("pull towards zero, times n")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(Path(__file__).with_name("prior.png"), dpi=130)


if __name__ == "__main__":
    main()
