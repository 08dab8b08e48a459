"""PLATON: pruning by upper confidence bounds of importance (Zhang et al., arXiv 2206.12562)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.methods.base import Method, setting
from mgpp.schedule import PruningSchedule
from mgpp.shards import CHUNK, Shard


@dataclass(kw_only=True, eq=False)
class PLATON(Method):
    """PLATON: by sensitivity |w grad|, smoothed, times its uncertainty.

    The published runs clip gradients at a norm of 1.
    """

    name = "platon"
    title = "PLATON"
    state_names = ("window", "importance", "uncertainty")

    beta1: float = setting(0.85, "Decay of the smoothed sensitivity.", ge=0, lt=1)
    beta2: float = setting(0.95, "Decay of its smoothed uncertainty.", ge=0, lt=1)

    def observe(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Take |w grad| into the mean of the window; at its end smooth both averages (eq. 7, 8, 10)."""
        ends = _ends_window(step, schedule)
        share = 1 / _place_in_window(step, schedule)
        parts = [values.split(CHUNK) for values in self.state(shard).values()]
        grads = shard.grad.split(CHUNK)
        for weight, grad, window, importance, uncertainty in zip(
            shard.chunks(), grads, *parts, strict=True
        ):
            window.lerp_((weight * grad).abs_(), share)
            if ends:
                importance.lerp_(window, 1 - self.beta1)
                uncertainty.lerp_((window - importance).abs_(), 1 - self.beta2)
                window.zero_()

    def score(self, shard: Shard) -> Tensor:
        """Return smoothed sensitivity times uncertainty (eq. 9)."""
        state = self.state(shard)
        return torch.mul(state["importance"], state["uncertainty"])


def _ends_window(step: int, schedule: PruningSchedule) -> bool:
    """Windows end every interval, and with every pruning, whose scores are then fresh."""
    return step % schedule.interval == 0 or schedule.is_pruning_step(step)


def _place_in_window(step: int, schedule: PruningSchedule) -> int:
    """Return the number of the step in its window, from 1."""
    first = step
    while first > 0 and not _ends_window(first - 1, schedule):
        first -= 1
    return step - first + 1
