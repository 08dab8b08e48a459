"""Which rows make up which batch: a function of the seed and the step alone, so it resumes anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import torch


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How rows are split among steps, micro-batches and workers.

    Every epoch is a fresh permutation drawn from (seed, epoch); an epoch's last incomplete batch is
    left out. The batch of a step is the same on any number of workers.

    Attributes:
        num_rows: rows of the training data.
        batch_size: rows an optimizer step takes, over all workers.
        micro_batch_size: rows a worker takes in one forward pass.
        world_size: number of workers.
        seed: of the permutations.
    """

    num_rows: int
    batch_size: int
    micro_batch_size: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro_batch_size * self.world_size):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.world_size} workers"
            )
        if self.num_rows < self.batch_size:
            raise ValueError(
                f"{self.num_rows} training rows do not fill one batch of {self.batch_size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return self.num_rows // self.batch_size

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of a step's whole batch, in order."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order_of_epoch(self.num_rows, self.seed * 1_000_003 + epoch)
        rows: list[int] = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        return rows

    def micro_batches(self, rank: int, first_step: int) -> Iterator[list[int]]:
        """Yield one worker's micro-batches of the steps from `first_step` on, without end."""
        size = self.micro_batch_size
        for step in count(first_step):
            rows = self.rows_of_step(step)
            for micro in range(self.accumulation):
                begin = (micro * self.world_size + rank) * size
                yield rows[begin : begin + size]


@lru_cache(maxsize=2)
def _order_of_epoch(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
