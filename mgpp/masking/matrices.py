"""The prunable weights as matrices: a weight is one, or a stack of them, as experts are held."""

from collections.abc import Mapping, Sequence

import torch

from mgpp.sharding.shards import Shard, num_matrices
from mgpp.sharding.stacks import Stacks


class Matrices:
    """The matrices of all prunable weights, numbered in order.

    Args:
        full_shapes: shape of each whole weight, by name, in the order of `Shard.index`.

    Attributes:
        weights: the index of each matrix's weight.
    """

    def __init__(self, full_shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.weights: list[int] = []
        self._first: list[int] = []
        for index, shape in enumerate(full_shapes.values()):
            self._first.append(len(self.weights))
            self.weights += [index] * num_matrices(shape)

    def stacks(self, shards: Sequence[Shard], sizes: Sequence[int], device: torch.device) -> Stacks:
        """Return shards by matrix.

        Args:
            shards: this rank's shards of weights, or of something else of which every matrix has so much.
            sizes: elements of a matrix, by its number.
            device: of the shards, should there be none.
        """
        firsts = [self._first[shard.index] for shard in shards]
        return Stacks(
            values=[shard.weight for shard in shards],
            places=[
                number
                for shard, first in zip(shards, firsts, strict=True)
                for number in (first, shard.offset, max(sizes[first], 1))
            ],
            num_matrices=len(self.weights),
            device=shards[0].flat.device if shards else device,
        )
