"""The settings of a fine-tune: how long, in what batches, at what rate."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipeline.section import Duration, NotNegative, Positive
from pipeline.training.batches import BatchPlan
from pipeline.training.engine import OptimizerConfig
from pipeline.training.lr_schedule import linear


class TrainConfig(OptimizerConfig):
    """Fine-tuning, with or without pruning."""

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {
            "micro_batch_size",
            "log_every",
            "checkpoint_every",
            "checkpoints_kept",
            "checkpoint_writing",
            "max_skipped_steps",
            "gradient_checkpointing",
        }
    )

    length: Duration = Duration("3ep")
    """How long to train: steps (500) or epochs ("3ep")."""
    batch_size: Positive = 32
    """Rows an optimizer step takes, over all workers and accumulation."""
    micro_batch_size: Positive | None = None
    """Rows a worker takes in one forward pass; batch_size over the workers unless given."""
    group_by_length: bool = False
    """Put rows of like length in one batch, so that less of it is padding."""
    lr_warmup_length: Duration = Duration(0)
    """Linear warm-up of the rate."""
    lr_final_factor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The rate falls linearly to this share of the peak."""
    log_every: Positive = 10
    """Steps between two records."""
    checkpoint_every: Positive | None = 500
    """Steps between two checkpoints; null keeps none."""
    max_skipped_steps: NotNegative = 0
    """How many steps with a gradient that is not finite are left out before the run stops (ZeRO 1-3)."""
    checkpoints_kept: Positive = 2
    """How many checkpoints are kept; older ones are deleted. One more is there while it is written."""
    checkpoint_writing: Literal["auto", "foreground", "background"] = "auto"
    """Training waits for a checkpoint in the foreground; in the background it continues while a copy in
    the host's memory is written; auto: in the background where the nodes' free memory holds the copy."""

    def rows_of_a_pass(self, num_workers: int) -> int:
        """Return how many rows each of so many workers takes in one forward pass."""
        return self.micro_batch_size or max(self.batch_size // num_workers, 1)

    def goes_with(self, num_workers: int) -> bool:
        """Return whether batches can be split among so many workers."""
        return self.batch_size % (self.rows_of_a_pass(num_workers) * num_workers) == 0

    def batch_plan(
        self, *, num_rows: int, world_size: int, lengths: Tensor | None = None
    ) -> BatchPlan:
        """Return how rows are split; `lengths`, tokens of each row, count with `group_by_length`."""
        return BatchPlan(
            num_rows=num_rows,
            batch_size=self.batch_size,
            micro_batch_size=self.rows_of_a_pass(world_size),
            world_size=world_size,
            seed=self.seed,
            lengths=lengths if self.group_by_length else None,
        )

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the run's optimizer steps."""
        return self.length.steps(steps_per_epoch=steps_per_epoch)

    def lr_at(self, step: int, num_steps: int, warmup_steps: int) -> float:
        """Return the learning rate of a step."""
        share = linear(step, num_steps, warmup_steps, self.lr_final_factor)
        return self.lr * share
