"""Sensitivities averaged over windows and smoothed, with their uncertainty: PLATON's way, and PINS's."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mgpp.kernels.devices import chunks
from mgpp.schedule import PruningSchedule

STATE_NAMES = ("window", "importance", "uncertainty")


def take_in(
    state: Mapping[str, Tensor],
    sensitivities: Iterable[Tensor],
    step: int,
    schedule: PruningSchedule,
    *,
    beta1: float,
    beta2: float,
) -> None:
    """Take a step's sensitivities into their window; where it begins one, smooth the last one's first.

    I is the window's mean: importance = beta1 importance + (1 - beta1) I, then
    uncertainty = beta2 uncertainty + (1 - beta2) |I - importance| (arXiv 2206.12562, eq. 7, 8 and 10).

    As in the published code (`update_ipt_with_local_window` of github.com/QingruZhang/PLATON), windows
    begin at multiples of the interval, and a pruning uses the windows before its own step. A pruning
    elsewhere, such as the first and the last of a schedule may be, begins a window too, so that it uses
    all steps before it; one at step 0 has none and uses that step.

    Args:
        state: `STATE_NAMES` of a shard: 1-D float32, zeros at first.
        sensitivities: of the shard, chunk by chunk.
        step: 0-based.
        schedule: its interval is the length of the windows.
        beta1: decay of the importance.
        beta2: decay of the uncertainty.
    """
    first = step
    while not _begins_window(first, schedule):
        first -= 1
    share = 1 / (step - first + 1)
    smooths_before = first == step and step > 0
    smooths_after = step == 0 and schedule.is_pruning_step(0)
    parts = [chunks(state[name]) for name in STATE_NAMES]
    for values, window, importance, uncertainty in zip(sensitivities, *parts, strict=True):
        if smooths_before:
            _smooth_(importance, uncertainty, window, beta1, beta2)
        window.lerp_(values, share)  # a share of 1 leaves nothing of the last window
        if smooths_after:
            _smooth_(importance, uncertainty, window, beta1, beta2)


def upper_bound(state: Mapping[str, Tensor]) -> Tensor:
    """Return importance times uncertainty (arXiv 2206.12562, eq. 9)."""
    return torch.mul(state["importance"], state["uncertainty"])


def _smooth_(
    importance: Tensor, uncertainty: Tensor, mean: Tensor, beta1: float, beta2: float
) -> None:
    importance.lerp_(mean, 1 - beta1)
    uncertainty.lerp_((mean - importance).abs_(), 1 - beta2)


def _begins_window(step: int, schedule: PruningSchedule) -> bool:
    return step % schedule.interval == 0 or schedule.is_pruning_step(step)
