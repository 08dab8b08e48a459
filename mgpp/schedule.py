"""What happens at which step: sparsity, the moments of pruning, and the slab's probability.

Steps are 0-based optimizer steps that were really taken (a step skipped on overflow is none). Of
`num_steps` steps, the first `warmup_steps` prune nothing, the last `finetune_steps` keep the mask
fixed, and in between sparsity rises along a cubic (Zhu & Gupta, arXiv 1710.01878).
"""

from dataclasses import dataclass
from typing import Literal

from mgpp.settings import check_number

Phase = Literal["warm-up", "gradual", "fixed mask"]


@dataclass(frozen=True, kw_only=True)
class PruningSchedule:
    """When to prune and how far.

    Attributes:
        num_steps: T, all optimizer steps of the run.
        warmup_steps: steps before the first pruning.
        finetune_steps: steps after the last pruning, with the mask fixed.
        interval: steps between two prunings.
        initial_sparsity: share of weights set to zero at the first pruning, in [0, 1).
        final_sparsity: share set to zero from the last pruning on, in [0, 1).

    Raises:
        ValueError: if a number is out of range or prune_start is not before prune_end.
    """

    num_steps: int
    warmup_steps: int
    finetune_steps: int
    interval: int
    final_sparsity: float
    initial_sparsity: float = 0.0

    def __post_init__(self) -> None:
        check_number("num_steps", self.num_steps, whole=True, at_least=1)
        for name in ("warmup_steps", "finetune_steps", "interval"):
            check_number(name, getattr(self, name), whole=True)
        for name in ("initial_sparsity", "final_sparsity"):
            check_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)!r}")
        if self.initial_sparsity > self.final_sparsity:
            raise ValueError(
                f"initial_sparsity ({self.initial_sparsity}) must not exceed final_sparsity "
                f"({self.final_sparsity})"
            )
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {self.interval}")
        if self.is_fixed_mask:
            return
        if min(self.warmup_steps, self.finetune_steps) < 0:
            raise ValueError("warmup_steps and finetune_steps must not be negative")
        if self.prune_start >= self.prune_end:
            raise ValueError(
                f"prune_start ({self.prune_start}, the warm-up steps) must come before prune_end "
                f"({self.prune_end} = num_steps {self.num_steps} - finetune_steps "
                f"{self.finetune_steps} - 1): train longer, or shorten warm-up or fine-tuning"
            )

    @classmethod
    def fixed_mask(cls, num_steps: int) -> "PruningSchedule":
        """Return the schedule that prunes nothing: the mask was fixed before the first step, at -1."""
        return cls(
            num_steps=num_steps,
            warmup_steps=-1,
            finetune_steps=num_steps,
            interval=1,
            final_sparsity=0.0,
        )

    @property
    def is_fixed_mask(self) -> bool:
        """Whether the mask is fixed from the first step on."""
        return self.warmup_steps == -1 and self.finetune_steps == self.num_steps

    @property
    def prune_start(self) -> int:
        """The step of the first pruning; before 0 where the mask is fixed from the first step on."""
        return self.warmup_steps

    @property
    def prune_end(self) -> int:
        """The step of the last pruning, likewise; the mask is fixed afterwards."""
        return self.num_steps - self.finetune_steps - 1

    def phase(self, step: int) -> Phase:
        """Name the part of the run in which `step` lies."""
        if step < self.prune_start:
            return "warm-up"
        return "gradual" if step <= self.prune_end else "fixed mask"

    def is_pruning_step(self, step: int) -> bool:
        """Tell whether weights are set to zero at the end of `step`."""
        if step in (self.prune_start, self.prune_end):
            return True
        return self.prune_start < step < self.prune_end and step % self.interval == 0

    def sparsity(self, step: int, final_sparsity: float | None = None) -> float:
        """s(t) = s_f + (s_i - s_f) r^3, r = 1 - (t - prune_start) / (prune_end - prune_start).

        Args:
            step: t.
            final_sparsity: s_f of weights that have another; s_i is that at most.
        """
        final = self.final_sparsity if final_sparsity is None else final_sparsity
        if step < self.prune_start:
            return 0.0
        if step >= self.prune_end:
            return final
        remaining = 1 - self.progress(step)
        return final + (min(self.initial_sparsity, final) - final) * remaining**3

    def progress(self, step: int) -> float:
        """Return how far `step` is from prune_start (0) to prune_end (1), clamped."""
        if self.is_fixed_mask:
            return 1.0
        done = (step - self.prune_start) / (self.prune_end - self.prune_start)
        return min(max(done, 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class SlabProbAnnealing:
    """slab_prob by step: constant until prune_start, then linear to `final_factor` at prune_end.

    Attributes:
        slab_prob: the paper's lambda.
        initial_factor: a_i, what multiplies it up to prune_start.
        final_factor: a_f, what multiplies it at prune_end.

    Raises:
        ValueError: if either end is not strictly between 0 and 1.
    """

    slab_prob: float = 0.1
    initial_factor: float = 1.0
    final_factor: float = 0.001

    def __post_init__(self) -> None:
        for name in ("initial_factor", "final_factor"):
            value = self.slab_prob * getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(
                    f"slab_prob x {name} must lie strictly between 0 and 1, got "
                    f"{self.slab_prob} x {getattr(self, name)} = {value}"
                )

    def at(self, step: int, schedule: PruningSchedule) -> float:
        """Return slab_prob(t)."""
        done = schedule.progress(step)
        return self.slab_prob * (
            self.initial_factor + (self.final_factor - self.initial_factor) * done
        )
