"""MGPP with saliency in place of magnitude: an extension of this project, not of the paper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.kernels.devices import chunks
from mgpp.methods.mgpp import MGPP
from mgpp.schedule import PruningSchedule
from mgpp.settings import setting
from mgpp.sharding.shards import Shard


@dataclass(kw_only=True, eq=False)
class MGPPSaliency(MGPP):
    """MGPP that prunes by |w| times the root mean square of the data's gradient.

    Its square is twice the rise in the loss when w is pruned, to second order with the Fisher
    information's diagonal for the Hessian's (optimal brain damage: LeCun, Denker, Solla, 1990; Theis et
    al., arXiv 1801.05787). In short runs magnitudes stay near what pretraining left; what the task needs
    shows in gradients first. The prior's gradient is left out of the mean.
    """

    name = "mgpp-saliency"
    title = "MGPP, pruned by saliency"
    state_names = ("mean_square",)

    decay: float = setting(0.995, "Decay of the mean squared gradient.", ge=0, lt=1)
    decoupled: bool = setting(
        True,
        "As of mgpp; a prior through the optimizer's moments costs short runs more than it gives.",
    )
    spare_pruned: bool = setting(
        True,
        "Let the decoupled prior shrink only what the current mask keeps: a weight at zero has no "
        "saliency, and held there between prunings it could not come back.",
    )

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Take the data's gradient into the mean, then add the prior's."""
        mean_square = chunks(self.state(shard)["mean_square"])
        for grad, mean in zip(chunks(shard.grad), mean_square, strict=True):
            mean.mul_(self.decay).addcmul_(grad, grad, value=1 - self.decay)
        super().adjust_grad(shard, step, schedule)

    def observe(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Shrink the weights after their update, if decoupled; the pruned ones too, unless spared."""
        if not (self.decoupled and self.spare_pruned):
            super().observe(shard, step, schedule)
            return
        assert self.kept is not None, "the pruner gives it"
        kept = chunks(self.kept(shard))
        for weight, mask in zip(chunks(shard.weight), kept, strict=True):
            shrunk = weight.clone()
            self.shrink(shrunk, step, schedule)
            torch.where(mask, shrunk, weight, out=weight)

    def score(self, shard: Shard) -> Tensor:
        """Return |w| sqrt(mean squared gradient)."""
        return shard.weight.abs().mul_(self.state(shard)["mean_square"].sqrt())
