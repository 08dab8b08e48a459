"""MGPP: magnitude pruning under a mixture-Gaussian prior (arXiv 2411.00969)."""

from dataclasses import dataclass

from mgpp.methods.base import Method, setting
from mgpp.prior import MixtureGaussianPrior, add_prior_grad_
from mgpp.schedule import PruningSchedule, SlabProbAnnealing
from mgpp.shards import Shard


@dataclass(kw_only=True, eq=False)
class MGPP(Method):
    """Magnitude pruning under the mixture-Gaussian prior.

    Every prunable weight is pulled towards the spike unless the data pulls it out.
    """

    name = "mgpp"
    title = "Magnitude pruning under a mixture-Gaussian prior (MGPP)"

    spike_var: float = setting(
        1e-10, "Variance of the narrow component (the paper's sigma_0^2).", gt=0
    )
    slab_var: float = setting(0.05, "Variance of the wide component (sigma_1^2).", gt=0)
    slab_prob: float = setting(0.1, "Prior probability of the wide component (lambda).", gt=0, lt=1)
    slab_prob_initial_factor: float = setting(
        1.0, "Multiplies slab_prob up to the first pruning.", gt=0
    )
    slab_prob_final_factor: float = setting(
        0.001, "Multiplies it at the last pruning; linear in between.", gt=0
    )

    def __post_init__(self) -> None:
        """Check the settings, also with each other."""
        super().__post_init__()
        self.prior = MixtureGaussianPrior(spike_var=self.spike_var, slab_var=self.slab_var)
        self.annealing = SlabProbAnnealing(
            slab_prob=self.slab_prob,
            initial_factor=self.slab_prob_initial_factor,
            final_factor=self.slab_prob_final_factor,
        )

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Add the gradient of -(1/n) log pi(w)."""
        add_prior_grad_(
            shard.grad,
            shard.weight,
            prior=self.prior,
            slab_prob=self.annealing.at(step, schedule),
            num_examples=self.num_examples,
        )

    def log_values(self, step: int, schedule: PruningSchedule) -> dict[str, float]:
        """Return slab_prob and the spike threshold w* of this step."""
        slab_prob = self.annealing.at(step, schedule)
        return {
            "slab_prob": slab_prob,
            "spike_threshold": self.prior.spike_threshold(slab_prob),
        }
