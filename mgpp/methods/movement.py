"""Movement pruning (Sanh, Wolf, Rush, arXiv 2005.07683): by where weights move, not by where they are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mgpp.kernels.devices import chunks
from mgpp.methods.base import Method
from mgpp.schedule import PruningSchedule
from mgpp.sharding.shards import Shard


@dataclass(kw_only=True, eq=False)
class Movement(Method):
    """Movement pruning: by the sum of -w grad, which rises as a weight moves away from zero.

    Hard, with the straight-through estimator: what is pruned is kept aside, is still scored by the
    gradient it would have, and comes back if its score rises enough. The score's learning rate is a
    factor of all scores and of no effect. One threshold holds for all matrices (`global_topk` of the
    published code), whose runs train the scores by Adam: that is `soft-movement` with a penalty of 0.
    """

    name = "movement"
    title = "Movement pruning"
    state_names: ClassVar[tuple[str, ...]] = ("score", "pruned_weight")
    holds_mask = True

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Sum up -w dL/dw (eq. 4); the pruned weights themselves have no gradient."""
        state = self.state(shard)
        for weight, grad, score, pruned in zip(
            chunks(shard.weight),
            chunks(shard.grad),
            chunks(state["score"]),
            chunks(state["pruned_weight"]),
            strict=True,
        ):
            score.addcmul_(weight + pruned, grad, value=-1)  # one of the two is zero
            grad.masked_fill_(pruned != 0, 0.0)

    def observe(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Move what is kept aside as the optimizer moves it."""
        update_pruned(shard, self.state(shard)["pruned_weight"])

    def score(self, shard: Shard) -> Tensor:
        """Return the scores as floats that are not negative, in the same order."""
        return self.ordered(self.addable_score(shard))

    def addable_score(self, shard: Shard) -> Tensor:
        """Return the scores, of either sign."""
        return self.state(shard)["score"]

    def ordered(self, scores: Tensor) -> Tensor:
        """Return scores as floats that are not negative, in the same order."""
        return ordered_floats(scores)

    def threshold(self, score: float) -> float:
        """Return the sum of -w grad that a score stands for."""
        return signed_float(score)


def update_pruned(shard: Shard, pruned_weight: Tensor) -> None:
    """Add to pruned weights what the optimizer has just made of the zeros in their places.

    Their gradient is zero, but momentum lasts for a while, and the published code lets it move the
    weights behind the mask.

    Args:
        shard: after its update, the mask not yet applied again.
        pruned_weight: what of it is pruned, 0 elsewhere; changed in place.
    """
    for weight, pruned in zip(chunks(shard.weight), chunks(pruned_weight), strict=True):
        pruned.add_(weight.masked_fill(pruned == 0, 0.0))


def ordered_floats(scores: Tensor) -> Tensor:
    """Return float32 scores of any sign as float32 that are not negative, in the same order.

    Their 32 bits become 31, so that neighbours among floats may be tied.
    """
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the floats
    return ((ordered >> 1) + (1 << 30)).view(torch.float32)


def signed_float(ordered: float) -> float:
    """Return the score that a result of `ordered_floats` stands for, to the last bit but one."""
    key = int(torch.tensor(ordered, dtype=torch.float32).view(torch.int32))
    bits = torch.tensor((key - (1 << 30)) << 1, dtype=torch.int32)
    return float((bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32))
