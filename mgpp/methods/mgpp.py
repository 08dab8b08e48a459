"""MGPP: magnitude pruning under a mixture-Gaussian prior (arXiv 2411.00969)."""

from mgpp.methods.base import Method
from mgpp.prior import MixtureGaussianPrior, add_prior_grad_
from mgpp.schedule import PruningSchedule, SlabProbAnnealing
from mgpp.shards import Shard


class MGPP(Method):
    """Pull every prunable weight towards the spike unless the data pulls it out.

    Args:
        num_examples: n, training examples; the log prior is weighted by 1/n.
        prior: the variances of spike and slab.
        annealing: slab_prob by step.

    Raises:
        ValueError: if num_examples is below 1.
    """

    name = "mgpp"

    def __init__(
        self,
        *,
        num_examples: int,
        prior: MixtureGaussianPrior | None = None,
        annealing: SlabProbAnnealing | None = None,
    ) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        self.num_examples = num_examples
        self.prior = prior or MixtureGaussianPrior()
        self.annealing = annealing or SlabProbAnnealing()

    @classmethod
    def of(
        cls,
        *,
        num_examples: int,
        spike_var: float,
        slab_var: float,
        slab_prob: float,
        slab_prob_initial_factor: float,
        slab_prob_final_factor: float,
    ) -> "MGPP":
        """Build it from plain numbers, named as in configurations.

        Raises:
            ValueError: if one is out of range.
        """
        return cls(
            num_examples=num_examples,
            prior=MixtureGaussianPrior(spike_var=spike_var, slab_var=slab_var),
            annealing=SlabProbAnnealing(
                slab_prob=slab_prob,
                initial_factor=slab_prob_initial_factor,
                final_factor=slab_prob_final_factor,
            ),
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
