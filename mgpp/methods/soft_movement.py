"""Soft movement pruning (Sanh, Wolf, Rush, arXiv 2005.07683): scores that are trained, and penalised."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.kernels.devices import chunks
from mgpp.methods.movement import Movement, signed_float
from mgpp.schedule import PruningSchedule
from mgpp.settings import setting
from mgpp.sharding.shards import Shard

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


@dataclass(kw_only=True, eq=False)
class SoftMovement(Movement):
    """Soft movement pruning: by scores that Adam trains with the weights, penalised more and more.

    The mask is sigmoid(S) > tau, one tau for all matrices, and S has the gradient of its mask
    (straight-through), w dL/dw, plus that of the penalty: `penalty` times the mean of sigmoid(S), which
    pulls every score down that the data does not push up.

    The paper fixes tau(t), and the sparsity is what comes of it, so that `penalty` must be searched for.
    Here the schedule gives the sparsity, exactly, and tau(t) is the quantile that takes: it is what is
    reported as the threshold. The penalty rises as the published one does, along the cubic of its tau.
    The published runs draw the mask anew at every step (an interval of 1), also at the end, where the
    schedule here keeps it fixed, and clip the gradients of scores and weights by one norm; here that of
    the weights, pruned ones included, is clipped, and the scores' are made of them.

    Pruned weights have no gradient, keep their values but for what momentum still makes of them, and go
    on to be scored by the gradient they would have. With a penalty of 0 this is hard movement pruning
    with scores trained by Adam.
    """

    name = "soft-movement"
    title = "Soft movement pruning"
    state_names = ("score", "pruned_weight", "score_exp_avg", "score_exp_avg_sq")

    score_lr: float = setting(
        0.01, "Peak learning rate of the scores, which follows the weights' own schedule.", gt=0
    )
    penalty: float = setting(
        400.0,
        "Weight of the scores' mean sigmoid in the loss, lambda_mvp; rises from 0 to the last pruning.",
        ge=0,
    )

    def penalty_at(self, step: int, schedule: PruningSchedule) -> float:
        """Return lambda(t) = lambda (1 - r^3), r as in `PruningSchedule.sparsity`."""
        return self.penalty * (1 - (1 - schedule.progress(step)) ** 3)

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Take a step of Adam with the scores; the pruned weights themselves have no gradient."""
        state = self.state(shard)
        lr = self.score_lr * (self.lr / self.peak_lr if self.peak_lr else 1.0)
        # A mean over the matrices of the mean over each, as in the published code.
        penalty = self.penalty_at(step, schedule) / (self.num_matrices * shard.matrix_numel)
        for weight, grad, score, pruned, exp_avg, exp_avg_sq in zip(
            chunks(shard.weight),
            chunks(shard.grad),
            *(chunks(state[name]) for name in self.state_names),
            strict=True,
        ):
            score_grad = (weight + pruned).mul_(grad)  # one of the two is zero
            kept = score.sigmoid()
            score_grad.addcmul_(kept, 1 - kept, value=penalty)
            _adam_step_(score, score_grad, exp_avg, exp_avg_sq, lr=lr, num_steps=step + 1)
            grad.masked_fill_(pruned != 0, 0.0)

    def threshold(self, score: float) -> float:
        """Return tau, the sigmoid of the largest score that was pruned."""
        return float(torch.tensor(signed_float(score), dtype=torch.float32).sigmoid())

    def log_values(self, step: int, schedule: PruningSchedule) -> dict[str, float]:
        """Return the penalty of this step."""
        return {"penalty": self.penalty_at(step, schedule)}


def _adam_step_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    num_steps: int,
) -> None:
    """Update values and both moments in place (Kingma & Ba, arXiv 1412.6980).

    Args:
        values: what is trained.
        grad: its gradient.
        exp_avg: mean of gradients.
        exp_avg_sq: mean of their squares.
        lr: learning rate.
        num_steps: steps taken, with this one.
    """
    exp_avg.lerp_(grad, 1 - _BETA1)
    exp_avg_sq.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1 - _BETA2**num_steps)).add_(_EPS)
    values.addcdiv_(exp_avg, root, value=-lr / (1 - _BETA1**num_steps))
