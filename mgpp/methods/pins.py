"""PINS: pruning by principled importance (Ren & Zhu, arXiv 2305.12394)."""

from dataclasses import dataclass

from torch import Tensor

from mgpp.kernels.devices import chunks
from mgpp.methods import moving_average
from mgpp.methods.base import Method
from mgpp.schedule import PruningSchedule
from mgpp.settings import setting
from mgpp.sharding.shards import Shard


@dataclass(kw_only=True, eq=False)
class PINS(Method):
    """PINS: by |lr grad^2 - w grad|, smoothed, times its uncertainty.

    To first order lr grad^2 - w grad is how much lower the loss is after a step of gradient descent where
    a weight is kept than where it is pruned: which k to prune is a 0-1 integer linear program, solved by
    the k smallest. The published code (github.com/DRSY/PINS, `Pruner.py`) takes the magnitude, of the
    weight before its update and the clipped gradient, and averages and smooths it as PLATON does; beta2
    is that of its GLUE runs. They clip gradients at a norm of 1.

    The paper's self-regularization, distillation from the best model so far, is a term of the loss and no
    part of the method: what prunes by PINS here learns from a teacher only where one is given.
    """

    name = "pins"
    title = "PINS"
    state_names = moving_average.STATE_NAMES

    beta1: float = setting(0.85, "Decay of the smoothed importance.", ge=0, lt=1)
    beta2: float = setting(0.99, "Decay of its smoothed uncertainty.", ge=0, lt=1)

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Take in |lr grad^2 - w grad|, w before its update; the gradient is left as it is."""
        pairs = zip(chunks(shard.weight), chunks(shard.grad), strict=True)
        values = ((self.lr * grad).sub_(weight).mul_(grad).abs_() for weight, grad in pairs)
        moving_average.take_in(
            self.state(shard), values, step, schedule, beta1=self.beta1, beta2=self.beta2
        )

    def score(self, shard: Shard) -> Tensor:
        """Return smoothed importance times uncertainty."""
        return moving_average.upper_bound(self.state(shard))
