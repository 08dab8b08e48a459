"""The pruning section of the configuration: which method, how far and when."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mgpp import (
    GMP,
    MGPP,
    Method,
    PruningSchedule,
)
from pipeline.section import Duration, Positive, Section, Share

_Factor = Annotated[float, Field(gt=0)]


class MGPPConfig(Section):
    """Magnitude pruning under the mixture-Gaussian prior."""

    name: Literal["mgpp"]
    spike_var: Annotated[float, Field(gt=0)] = 1e-10
    """Variance of the narrow component (the paper's sigma_0^2)."""
    slab_var: Annotated[float, Field(gt=0)] = 0.05
    """Variance of the wide component (sigma_1^2)."""
    slab_prob: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Prior probability of the wide component (lambda)."""
    slab_prob_initial_factor: _Factor = 1.0
    """Multiplies slab_prob up to the first pruning."""
    slab_prob_final_factor: _Factor = 0.001
    """Multiplies it at the last pruning; linear in between."""

    @model_validator(mode="after")
    def _check(self) -> "MGPPConfig":
        self.build(num_examples=1)
        return self

    def build(self, *, num_examples: int) -> Method:
        """Return the method for a number of training examples."""
        return MGPP.of(num_examples=num_examples, **self.model_dump(exclude={"name"}))


class GMPConfig(Section):
    """Gradual magnitude pruning, no prior."""

    name: Literal["gmp"]

    def build(self, *, num_examples: int) -> Method:
        """Return the method; it does not depend on the data."""
        return GMP()


AnyMethodConfig = Annotated[MGPPConfig | GMPConfig, Field(discriminator="name")]


class PruneConfig(Section):
    """What is pruned, how far and when."""

    method: AnyMethodConfig = MGPPConfig(name="mgpp")
    """The pruning method."""
    start: Literal["pretrained", "dense"] = "pretrained"
    """Prune from the pretrained weights, as in the paper, or from the dense fine-tune."""
    sparsity: Share
    """Final share of the prunable weights set to zero."""
    initial_sparsity: Share = 0.0
    """Share set to zero at the first pruning."""
    warmup: Duration = Duration("10%")
    """Training before the first pruning (prune_start)."""
    finetune: Duration = Duration("10%")
    """Training after the last pruning (prune_end), with the mask fixed."""
    interval: Positive = 10
    """Steps between two prunings."""
    include: list[str] = []
    """Patterns of prunable weights; all matrices of the repeated layers unless given."""
    exclude: list[str] = []
    """Patterns of weights to leave alone."""

    @model_validator(mode="after")
    def _check(self) -> "PruneConfig":
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity ({self.initial_sparsity}) must not exceed sparsity ({self.sparsity})"
            )
        return self

    def schedule(self, num_steps: int, steps_per_epoch: int) -> PruningSchedule:
        """Return the schedule of a run.

        Raises:
            ValueError: if prune_start is not before prune_end.
        """
        lengths: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "num_steps": num_steps}
        return PruningSchedule(
            num_steps=num_steps,
            warmup_steps=self.warmup.steps(**lengths),
            finetune_steps=self.finetune.steps(**lengths),
            interval=self.interval,
            initial_sparsity=self.initial_sparsity,
            final_sparsity=self.sparsity,
        )
