"""The methods once more, in one process on whole weights, straight from their papers' equations."""

import torch
from torch import Tensor, nn

from mgpp import PruningSchedule


class Magnitude:
    """By magnitude; GMP and MGPP."""

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        self.weights = weights
        self.schedule = schedule

    def before_update(self, keep: list[Tensor]) -> None:
        """See the gradients before the optimizer does."""

    def after_update(self, keep: list[Tensor], step: int) -> None:
        """See weights and gradients after it."""

    def before_pruning(self, keep: list[Tensor]) -> None:
        """Make the weights ready to be chosen from."""

    def scores(self) -> list[Tensor]:
        """Return what is pruned lowest first."""
        return [weight.detach().abs() for weight in self.weights]


class Platon(Magnitude):
    """arXiv 2206.12562, equations 7 to 10, with the averages over windows of its published code."""

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.window: list[list[Tensor]] = [[] for _ in weights]
        self.smoothed = [torch.zeros_like(weight) for weight in weights]
        self.uncertainty = [torch.zeros_like(weight) for weight in weights]

    def after_update(self, keep: list[Tensor], step: int) -> None:
        for i, weight in enumerate(self.weights):
            self.window[i].append((weight * weight.grad).abs())
            if step % self.schedule.interval and not self.schedule.is_pruning_step(step):
                continue
            importance = torch.stack(self.window[i]).mean(dim=0)
            self.smoothed[i] = 0.85 * self.smoothed[i] + 0.15 * importance
            variation = (importance - self.smoothed[i]).abs()
            self.uncertainty[i] = 0.95 * self.uncertainty[i] + 0.05 * variation
            self.window[i] = []

    def scores(self) -> list[Tensor]:
        return [a * b for a, b in zip(self.smoothed, self.uncertainty, strict=True)]


class Movement(Magnitude):
    """arXiv 2005.07683, equation 4: the gradient at the masked weights times the weights, summed."""

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.sums = [torch.zeros_like(weight) for weight in weights]
        self.whole = [weight.detach().clone() for weight in weights]

    def before_update(self, keep: list[Tensor]) -> None:
        for weight, kept, total, whole in zip(
            self.weights, keep, self.sums, self.whole, strict=True
        ):
            assert weight.grad is not None
            whole[kept] = weight.detach()[kept]
            total.sub_(whole * weight.grad)
            weight.grad[~kept] = 0.0

    def after_update(self, keep: list[Tensor], step: int) -> None:
        for weight, kept in zip(self.weights, keep, strict=True):
            weight[~kept] = 0.0

    def before_pruning(self, keep: list[Tensor]) -> None:
        for weight, kept, whole in zip(self.weights, keep, self.whole, strict=True):
            whole[kept] = weight[kept]
            weight.copy_(whole)

    def scores(self) -> list[Tensor]:
        return self.sums


REFERENCES = {"mgpp": Magnitude, "gmp": Magnitude, "platon": Platon, "movement": Movement}
