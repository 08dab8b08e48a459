"""Movement pruning (Sanh, Wolf, Rush, arXiv 2005.07683): by where weights move, not by where they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.methods.base import Method
from mgpp.schedule import PruningSchedule
from mgpp.shards import CHUNK, Shard


@dataclass(kw_only=True, eq=False)
class Movement(Method):
    """Movement pruning: by the sum of -w grad, which rises as a weight moves away from zero.

    Hard, with the straight-through estimator: what is pruned is kept aside, goes on to be scored by the
    gradient it would have, and comes back as it was if its score rises enough. The score's learning rate
    is a factor of all scores and of no effect.
    """

    name = "movement"
    title = "Movement pruning"
    state_names = ("score", "pruned_weight")
    holds_mask = True

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Sum up -w dL/dw (eq. 4) and keep the optimizer from moving what is pruned."""
        state = self.state(shard)
        for weight, grad, score, pruned in zip(
            shard.chunks(),
            shard.grad.split(CHUNK),
            state["score"].split(CHUNK),
            state["pruned_weight"].split(CHUNK),
            strict=True,
        ):
            score.addcmul_(weight + pruned, grad, value=-1)  # one of the two is zero
            grad.masked_fill_(pruned != 0, 0.0)

    def score(self, shard: Shard) -> Tensor:
        """Return the sums as floats that are not negative, in the same order."""
        return self.ordered(self.addable_score(shard))

    def addable_score(self, shard: Shard) -> Tensor:
        """Return the sums of -w grad."""
        return self.state(shard)["score"]

    def ordered(self, scores: Tensor) -> Tensor:
        """Return scores as floats that are not negative, in the same order.

        Their 32 bits become 31, so that neighbours among floats may be tied.
        """
        bits = scores.view(torch.int32)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the floats
        return ((ordered >> 1) + (1 << 30)).view(torch.float32)

    def threshold(self, score: float) -> float:
        """Return the sum of -w grad that a score stands for."""
        key = int(torch.tensor(score, dtype=torch.float32).view(torch.int32))
        ordered = torch.tensor((key - (1 << 30)) << 1, dtype=torch.int32)
        return float((ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32))
