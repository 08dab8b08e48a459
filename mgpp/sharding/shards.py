"""What a rank holds of each prunable weight.

A *shard* is this rank's contiguous range of one float32 master weight, wherever a backend keeps it:
the parameter itself in plain torch, a range of DeepSpeed's flat partition under ZeRO. Padding that a
backend adds is never part of a shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.sharding.collectives import Collectives


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's part of one prunable weight.

    The shards of one weight must lie on the ranks in the order of their offsets; torch, ZeRO 1/2 and
    ZeRO 3 all do so. It makes the choice among tied magnitudes independent of the number of ranks.

    Attributes:
        name: the parameter's name in the full model.
        index: the weight's place among all prunable weights, the same on every rank.
        full_shape: shape of the whole weight.
        offset: where the shard begins in the flattened whole weight, in elements.
        numel: elements in the shard; 0 is allowed.
        flat: the float32 tensor the optimizer updates; the shard is a range of it.
        start: where the shard begins in the flattened `flat`.
    """

    name: str
    index: int
    full_shape: tuple[int, ...]
    offset: int
    numel: int
    flat: Tensor
    start: int

    def __post_init__(self) -> None:
        if self.flat.dtype != torch.float32:
            raise ValueError(
                f"{self.name}: master weights must be float32, got {self.flat.dtype}; below float32 "
                "a weight near the spike threshold cannot move by one optimizer step"
            )
        assert self.start + self.numel <= self.flat.numel(), self.name

    @property
    def weight(self) -> Tensor:
        """The shard itself: 1-D float32 view, writing to it writes to the master weight."""
        return self.flat.detach().view(-1).narrow(0, self.start, self.numel)

    @property
    def grad(self) -> Tensor:
        """The shard's gradient: 1-D float32 view; valid between reduction and the optimizer step."""
        grad = self.flat.grad
        if grad is None:
            raise RuntimeError(
                f"{self.name}: no gradient at the optimizer step; was backward run, and does the "
                "weight take part in the loss?"
            )
        return grad.detach().view(-1).narrow(0, self.start, self.numel)

    @property
    def full_numel(self) -> int:
        """Elements of the whole weight."""
        return int(torch.Size(self.full_shape).numel())

    @property
    def matrix_numel(self) -> int:
        """Elements of the weight, or of one matrix if it is a stack of them."""
        return self.full_numel // num_matrices(self.full_shape)


def num_matrices(shape: tuple[int, ...]) -> int:
    """Return how many matrices a weight is: a stack of them has three dimensions."""
    return shape[0] if len(shape) == 3 else 1


def check_coverage(
    shards: Sequence[Shard], full_numels: Sequence[int], collectives: Collectives
) -> None:
    """Assert that over all ranks every element of every prunable weight is in exactly one shard.

    Args:
        shards: this rank's shards.
        full_numels: elements of each whole weight, by `Shard.index`.
        collectives: the group over which the weights are sharded.

    Raises:
        RuntimeError: naming the first weight whose shards do not add up.
    """
    held = [0] * len(full_numels)
    for shard in shards:
        held[shard.index] += shard.numel
    names = {shard.index: shard.name for shard in shards}
    for index, (total, full) in enumerate(zip(collectives.sum(held), full_numels, strict=True)):
        if total != full:
            raise RuntimeError(
                f"the ranks together hold {total} of the {full} elements of prunable weight "
                f"{names.get(index, index)}: the backend's layout is not the one this version knows"
            )
