"""PLATON: pruning by upper confidence bounds of importance (Zhang et al., arXiv 2206.12562)."""

from dataclasses import dataclass

from torch import Tensor

from mgpp.kernels.devices import chunks
from mgpp.methods import moving_average
from mgpp.methods.base import Method
from mgpp.schedule import PruningSchedule
from mgpp.settings import setting
from mgpp.sharding.shards import Shard


@dataclass(kw_only=True, eq=False)
class PLATON(Method):
    """PLATON: by sensitivity |w grad|, smoothed, times its uncertainty.

    The published runs clip gradients at a norm of 1.
    """

    name = "platon"
    title = "PLATON"
    state_names = moving_average.STATE_NAMES

    beta1: float = setting(0.85, "Decay of the smoothed sensitivity.", ge=0, lt=1)
    beta2: float = setting(0.95, "Decay of its smoothed uncertainty.", ge=0, lt=1)

    def observe(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Take in |w grad|, w after its update."""
        pairs = zip(chunks(shard.weight), chunks(shard.grad), strict=True)
        sensitivities = ((weight * grad).abs_() for weight, grad in pairs)
        moving_average.take_in(
            self.state(shard), sensitivities, step, schedule, beta1=self.beta1, beta2=self.beta2
        )

    def score(self, shard: Shard) -> Tensor:
        """Return smoothed sensitivity times uncertainty (eq. 9)."""
        return moving_average.upper_bound(self.state(shard))
