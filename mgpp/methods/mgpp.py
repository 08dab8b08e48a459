"""MGPP: magnitude pruning under a mixture-Gaussian prior (arXiv 2411.00969)."""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from mgpp.methods.base import Method
from mgpp.prior import MixtureGaussianPrior, add_prior_grad_, shrink_
from mgpp.schedule import PruningSchedule, SlabProbAnnealing
from mgpp.settings import setting
from mgpp.sharding.shards import Shard


@dataclass(kw_only=True, eq=False)
class MGPP(Method):
    """Magnitude pruning under the mixture-Gaussian prior.

    Every prunable weight is pulled towards the spike unless the data pulls it out.
    """

    name = "mgpp"
    title = "Magnitude pruning under a mixture-Gaussian prior (MGPP)"

    spike_var: float | None = setting(
        None, "Variance of the narrow component (the paper's sigma_0^2); 1e-10 unless given.", gt=0
    )
    spike_threshold: float | None = setting(
        None,
        "Instead of spike_var: |w| at which spike and slab are equally likely, at slab_prob times its "
        "initial factor, in learning rates (one step of Adam is about one learning rate).",
        gt=0,
    )
    spike_follows_lr: bool = setting(
        False, "Let spike_threshold follow the learning rate; else the peak rate is used."
    )
    slab_var: float = setting(0.05, "Variance of the wide component (sigma_1^2).", gt=0)
    slab_prob: float = setting(0.1, "Prior probability of the wide component (lambda).", gt=0, lt=1)
    slab_prob_initial_factor: float = setting(
        1.0, "Multiplies slab_prob up to the first pruning.", gt=0
    )
    slab_prob_final_factor: float = setting(
        0.001, "Multiplies it at the last pruning; linear in between.", gt=0
    )
    decoupled: bool = setting(
        False,
        "Shrink weights by the prior after the optimizer's step, as AdamW decays them, instead of adding "
        "its gradient: the prior then does not swell the optimizer's second moments.",
    )

    def __post_init__(self) -> None:
        """Check the settings, also with each other."""
        super().__post_init__()
        if self.spike_var is not None and self.spike_threshold is not None:
            raise ValueError("give spike_var or spike_threshold, not both")
        if self.spike_follows_lr and self.spike_threshold is None:
            raise ValueError("spike_follows_lr needs spike_threshold")
        self.annealing = SlabProbAnnealing(
            slab_prob=self.slab_prob,
            initial_factor=self.slab_prob_initial_factor,
            final_factor=self.slab_prob_final_factor,
        )
        self._fixed_prior: MixtureGaussianPrior | None = None
        if self.spike_threshold is None:
            spike_var = 1e-10 if self.spike_var is None else self.spike_var
            self._fixed_prior = MixtureGaussianPrior(spike_var=spike_var, slab_var=self.slab_var)

    @property
    def prior(self) -> MixtureGaussianPrior:
        """The prior at the step under way."""
        return self._fixed_prior or self._prior_for(self.lr or self.peak_lr)

    def begin(self, lr: float) -> None:
        """Fix the prior, unless it follows the learning rate."""
        super().begin(lr)
        if self.spike_threshold is not None:
            prior = self._prior_for(lr)
            self._fixed_prior = None if self.spike_follows_lr else prior

    def _prior_for(self, lr: float) -> MixtureGaussianPrior:
        assert self.spike_threshold is not None
        if lr <= 0:
            raise ValueError(
                f"spike_threshold is in learning rates, and the optimizer's is {lr}; give spike_var"
            )
        slab_prob = self.slab_prob * self.slab_prob_initial_factor
        return _prior_with_threshold(self.spike_threshold * lr, self.slab_var, slab_prob)

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Add the gradient of -(1/n) log pi(w), unless decoupled."""
        if not self.decoupled:
            add_prior_grad_(
                shard.grad,
                shard.weight,
                prior=self.prior,
                slab_prob=self.annealing.at(step, schedule),
                num_examples=self.num_examples,
            )

    def observe(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Shrink the weights after their update, if decoupled."""
        if self.decoupled:
            self.shrink(shard.weight, step, schedule)

    def shrink(self, weight: Tensor, step: int, schedule: PruningSchedule) -> None:
        """Take one proximal step of the prior: 1-D float32, in place."""
        shrink_(
            weight,
            prior=self.prior,
            slab_prob=self.annealing.at(step, schedule),
            step_size=self.lr / self.num_examples,
        )

    def log_values(self, step: int, schedule: PruningSchedule) -> dict[str, float]:
        """Return slab_prob, spike_var and the spike threshold w* of this step."""
        slab_prob, prior = self.annealing.at(step, schedule), self.prior
        return {
            "slab_prob": slab_prob,
            "spike_var": prior.spike_var,
            "spike_threshold": prior.spike_threshold(slab_prob),
        }


@lru_cache
def _prior_with_threshold(
    threshold: float, slab_var: float, slab_prob: float
) -> MixtureGaussianPrior:
    return MixtureGaussianPrior.with_threshold(threshold, slab_var=slab_var, slab_prob=slab_prob)
