"""Which rows make up which batch: a function of the seed and the step alone, so it resumes anywhere."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.tasks.base import DRAW_SEED

# Rows are sorted by length within so many batches: enough that a batch holds like lengths, few enough
# that the rows of a batch are still mostly drawn by chance.
_BATCHES_SORTED_TOGETHER = 50
_MOST_LOADERS = 4


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How rows are split among steps, micro-batches and workers.

    Every epoch is a fresh permutation drawn from (seed, epoch); an epoch's last incomplete batch is
    left out. The batch of a step is the same on any number of workers.

    With `lengths`, rows of like length share a batch, so that little of it is padding: the permutation is
    cut into stretches of 50 batches, each stretch sorted by length and cut into batches, and all batches
    of the epoch put in a random order.

    Attributes:
        num_rows: rows of the training data.
        batch_size: rows an optimizer step takes, over all workers.
        micro_batch_size: rows a worker takes in one forward pass.
        world_size: number of workers.
        seed: of the permutations.
        lengths: tokens of each row, 1-D int64, to group rows by; None leaves them in the drawn order.
    """

    num_rows: int
    batch_size: int
    micro_batch_size: int
    world_size: int
    seed: int
    lengths: Tensor | None = field(default=None, repr=False, compare=False)
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        if self.lengths is not None and len(self.lengths) != self.num_rows:
            raise ValueError(f"{len(self.lengths)} lengths were given for {self.num_rows} rows")

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
        begin = place * self.batch_size
        rows: list[int] = self._order_of(epoch)[begin : begin + self.batch_size].tolist()
        return rows

    def micro_batches(self, rank: int, first_step: int) -> Iterator[list[int]]:
        """Yield one worker's micro-batches of the steps from `first_step` on, without end."""
        for step, begin, end in self._cuts(rank, first_step):
            yield self.rows_of_step(step)[begin:end]

    def drawn_micro_batches(self, rank: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the same, each row with the seed of what is drawn for it in that step.

        The seed depends on the plan's, the step and the row's place in the step's whole batch.
        """
        for step, begin, end in self._cuts(rank, first_step):
            places = range(begin, end)
            seeds = (np.random.SeedSequence((self.seed, step, place)) for place in places)
            drawn = [int(seed.generate_state(1, np.uint64)[0]) for seed in seeds]
            yield list(zip(self.rows_of_step(step)[begin:end], drawn, strict=True))

    def _cuts(self, rank: int, first_step: int) -> Iterator[tuple[int, int, int]]:
        """Yield step, begin and end of one worker's micro-batches among the rows of the step."""
        size = self.micro_batch_size
        for step in count(first_step):
            for micro in range(self.accumulation):
                begin = (micro * self.world_size + rank) * size
                yield step, begin, begin + size

    def _order_of(self, epoch: int) -> Tensor:
        """Return the rows of an epoch in order; the last epoch asked for is kept."""
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.num_rows, generator=generator)
            if self.lengths is not None:
                order = self._grouped(order, self.lengths, generator)
            self._orders.clear()
            self._orders[epoch] = order
        return self._orders[epoch]

    def _grouped(self, order: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """Return the rows of whole batches, those of like length together."""
        order = order[: self.steps_per_epoch * self.batch_size]
        stretch = torch.arange(len(order)) // (_BATCHES_SORTED_TOGETHER * self.batch_size)
        of_rows = lengths[order]
        by_length = torch.argsort(stretch * (of_rows.max() + 1) + of_rows, stable=True)
        batches = order[by_length].view(self.steps_per_epoch, self.batch_size)
        return batches[torch.randperm(self.steps_per_epoch, generator=generator)].flatten()


class DrawnRows(Dataset[dict[str, Any]]):
    """Rows for collators that draw at random: each comes with its seed, at DRAW_SEED.

    Args:
        rows: a `datasets.Dataset`.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, drawn: tuple[int, int]) -> dict[str, Any]:
        """Return a row by its number and its seed."""
        row, seed = drawn
        return {**self._rows[row], DRAW_SEED: seed}


def loaded(
    rows: Any,
    batches: Iterable[list[Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of rows, in order.

    For a GPU they are made in pinned memory by processes beside this one, on its other CPU cores, so that
    the GPU does not wait for them. Which rows and what is drawn for them does not depend on that.

    Args:
        rows: a `datasets.Dataset`, or `DrawnRows`.
        batches: the rows of each batch.
        collate: makes a batch of rows.
        device: where batches go.
    """
    on_gpu = device.type == "cuda"
    loader: DataLoader[dict[str, Any]] = DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_loaders() if on_gpu else 0,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # or it draws a number from the one of dropout
    )
    return iter(loader)


def num_loaders() -> int:
    """Return how many processes make a GPU's batches: one on each other core of its worker, at most 4."""
    return min(torch.get_num_threads() - 1, _MOST_LOADERS)
