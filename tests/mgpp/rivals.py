"""The methods once more, in one process on whole weights, straight from their papers' equations."""

import torch
from torch import Tensor, nn

from mgpp import PruningSchedule

LR = 3e-3  # of the weights


class Magnitude:
    """By magnitude; GMP and MGPP."""

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        self.weights = weights
        self.schedule = schedule

    def before_update(self, keep: list[Tensor], step: int) -> None:
        """See the gradients before the optimizer does."""

    def after_update(self, keep: list[Tensor], step: int) -> None:
        """See weights and gradients after it."""

    def before_pruning(self, keep: list[Tensor]) -> None:
        """Make the weights ready to be chosen from."""

    def scores(self) -> list[Tensor]:
        """Return what is pruned lowest first."""
        return [weight.detach().abs() for weight in self.weights]


class Platon(Magnitude):
    """arXiv 2206.12562, equations 7 to 10, with the windows of its published code.

    A window is smoothed by the step that begins the next, which is not in it.
    """

    beta1, beta2 = 0.85, 0.95

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.window: list[list[Tensor]] = [[] for _ in weights]
        self.smoothed = [torch.zeros_like(weight) for weight in weights]
        self.uncertainty = [torch.zeros_like(weight) for weight in weights]

    def after_update(self, keep: list[Tensor], step: int) -> None:
        self.take_in([(weight * weight.grad).abs() for weight in self.weights], step)

    def take_in(self, sensitivities: list[Tensor], step: int) -> None:
        begins = step % self.schedule.interval == 0 or self.schedule.is_pruning_step(step)
        for i, sensitivity in enumerate(sensitivities):
            if begins and self.window[i]:
                importance = torch.stack(self.window[i]).mean(dim=0)
                self.smoothed[i] = self.beta1 * self.smoothed[i] + (1 - self.beta1) * importance
                variation = (importance - self.smoothed[i]).abs()
                self.uncertainty[i] = (
                    self.beta2 * self.uncertainty[i] + (1 - self.beta2) * variation
                )
                self.window[i] = []
            self.window[i].append(sensitivity)

    def scores(self) -> list[Tensor]:
        return [a * b for a, b in zip(self.smoothed, self.uncertainty, strict=True)]


class Pins(Platon):
    """arXiv 2305.12394: the loss after a step of SGD with a weight kept, less that with it pruned."""

    beta2 = 0.99

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.gains: list[Tensor] = []

    @torch.no_grad()
    def before_update(self, keep: list[Tensor], step: int) -> None:
        self.gains = []
        for weight in self.weights:
            assert weight.grad is not None
            kept = (weight - LR * weight.grad - weight) * weight.grad
            pruned = (0 - weight) * weight.grad
            self.gains.append((kept - pruned).abs())

    def after_update(self, keep: list[Tensor], step: int) -> None:
        self.take_in(self.gains, step)


class Masked(Magnitude):
    """The weights are whole while the optimizer steps; the model computes with W * M."""

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.whole = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def before_update(self, keep: list[Tensor], step: int) -> None:
        """What backward found is dL/d(W * M); by the chain rule dL/dW is that times M."""
        grads = [weight.grad for weight in self.weights]
        self.update_scores([g.clone() for g in grads if g is not None], step)
        for weight, kept, whole in zip(self.weights, keep, self.whole, strict=True):
            assert weight.grad is not None
            weight.copy_(whole)
            weight.grad.mul_(kept)

    def update_scores(self, grads: list[Tensor], step: int) -> None:
        """Given dL/d(W * M)."""

    def after_update(self, keep: list[Tensor], step: int) -> None:
        self.whole = [weight.detach().clone() for weight in self.weights]
        for weight, kept in zip(self.weights, keep, strict=True):
            weight[~kept] = 0.0

    def before_pruning(self, keep: list[Tensor]) -> None:
        for weight, whole in zip(self.weights, self.whole, strict=True):
            weight.copy_(whole)


class Movement(Masked):
    """arXiv 2005.07683, equation 4: the gradient at the masked weights times the weights, summed."""

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.sums = [torch.zeros_like(weight) for weight in weights]

    def update_scores(self, grads: list[Tensor], step: int) -> None:
        for grad, total, whole in zip(grads, self.sums, self.whole, strict=True):
            total.sub_(whole * grad)

    def scores(self) -> list[Tensor]:
        return self.sums


class SoftMovement(Masked):
    """The same, section 4 and table 1: torch's Adam trains the scores, autograd derives their penalty."""

    penalty = 2.0

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.trained = [nn.Parameter(torch.zeros_like(weight)) for weight in weights]
        self.adam = torch.optim.Adam(self.trained, lr=0.01)

    def update_scores(self, grads: list[Tensor], step: int) -> None:
        self.adam.zero_grad()
        rises = 1 - (1 - self.schedule.progress(step)) ** 3
        with torch.enable_grad():
            means = torch.stack([score.sigmoid().mean() for score in self.trained])
            (self.penalty * rises * means.mean()).backward()
        for score, grad, whole in zip(self.trained, grads, self.whole, strict=True):
            assert score.grad is not None
            score.grad += whole * grad  # the mask's gradient, taken for the score's
        self.adam.step()

    def scores(self) -> list[Tensor]:
        return [score.detach() for score in self.trained]


class Saliency(Magnitude):
    """|w| sqrt(mean g^2), and the prior's proximal step after each update, by densities in float64."""

    decay, num_examples, spike_var, slab_var = 0.98, 500, 1e-6, 0.05
    spares_pruned = False

    def __init__(self, weights: list[nn.Parameter], schedule: PruningSchedule) -> None:
        super().__init__(weights, schedule)
        self.means = [torch.zeros_like(weight) for weight in weights]

    def before_update(self, keep: list[Tensor], step: int) -> None:
        for i, weight in enumerate(self.weights):
            self.means[i] = self.decay * self.means[i] + (1 - self.decay) * weight.grad**2

    def after_update(self, keep: list[Tensor], step: int) -> None:
        start, end = self.schedule.prune_start, self.schedule.prune_end
        slab_prob = 0.1 + (0.0001 - 0.1) * min(max((step - start) / (end - start), 0), 1)
        for weight, kept in zip(self.weights, keep, strict=True):
            exact = weight.double()
            spike, slab = (
                share * torch.exp(-(exact**2) / (2 * var)) / var**0.5
                for share, var in ((1 - slab_prob, self.spike_var), (slab_prob, self.slab_var))
            )
            pull = (spike / self.spike_var + slab / self.slab_var) / (spike + slab)
            shrunk = exact / (1 + LR / self.num_examples * pull)
            weight.copy_(torch.where(kept, shrunk, exact) if self.spares_pruned else shrunk)

    def scores(self) -> list[Tensor]:
        pairs = zip(self.weights, self.means, strict=True)
        return [weight.detach().abs() * mean.sqrt() for weight, mean in pairs]


class SparingSaliency(Saliency):
    """The same, the prior on what the mask keeps alone."""

    spares_pruned = True


REFERENCES = {
    "mgpp": Magnitude,
    "gmp": Magnitude,
    "platon": Platon,
    "movement": Movement,
    "soft-movement": SoftMovement,
    "pins": Pins,
    "mgpp-saliency": Saliency,
    "mgpp-saliency-sparing": SparingSaliency,
}
