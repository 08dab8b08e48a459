"""The one collective the pruner needs, handed in so that the rest knows no process group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgpp.kernels.devices import moved


def _identity(_: Tensor) -> None:
    """Sum over a single rank: nothing to do."""


@dataclass(frozen=True)
class Collectives:
    """A summing all-reduce over the ranks among which the weights are sharded.

    The default is one process, the world-size-1 case of the same path.

    Attributes:
        rank: this process's rank in the group.
        world_size: number of ranks in the group.
        all_reduce: sums an int64 tensor over the group, in place.
        device: where the tensors given to `all_reduce` must live.
    """

    rank: int = 0
    world_size: int = 1
    all_reduce: Callable[[Tensor], None] = _identity
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def over(cls, group: Any = None, device: torch.device | None = None) -> "Collectives":
        """Build from a `torch.distributed` process group (None: the default group)."""

        def all_reduce(tensor: Tensor) -> None:
            dist.all_reduce(tensor, group=group)

        return cls(
            rank=dist.get_rank(group),
            world_size=dist.get_world_size(group),
            all_reduce=all_reduce,
            device=device or torch.device("cpu"),
        )

    def summed(self, counts: Tensor) -> Tensor:
        """Return the element-wise sum over all ranks of an int64 tensor, which may be changed."""
        total = moved(counts, self.device)
        self.all_reduce(total)
        return moved(total, counts.device)

    def sum(self, counts: Sequence[int] | Tensor) -> list[int]:
        """Return the element-wise sum of integers over all ranks; a tensor, 1-D int64, may be changed."""
        total = moved(torch.as_tensor(counts, dtype=torch.int64), self.device)
        self.all_reduce(total)
        return [int(value) for value in total.tolist()]

    def by_rank(self, value: int) -> list[int]:
        """Return the integer of every rank, in rank order."""
        return self.sum([value if rank == self.rank else 0 for rank in range(self.world_size)])

    def by_rank_all(self, values: list[int]) -> list[list[int]]:
        """Return for each integer of the list those of every rank, in rank order; one reduction."""
        sent = [0] * (len(values) * self.world_size)
        sent[self.rank :: self.world_size] = values
        summed = self.sum(sent) if values else []
        return [summed[i : i + self.world_size] for i in range(0, len(summed), self.world_size)]
