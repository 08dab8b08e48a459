"""A prunable weight as matrices: itself, or each matrix of a stack of them, as experts are held.

A shard is a range of a whole weight, and so of its matrices one after the other. What is counted or cut
matrix by matrix sees it as a shard of each.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mgpp.sharding.shards import CHUNK, Shard, num_matrices


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

    def split(
        self, shards: Sequence[Shard], sizes: Sequence[int]
    ) -> tuple[list[Shard], list[range]]:
        """Return shards of matrices, whose `index` is the matrix's number, and which are of each shard.

        Args:
            shards: this rank's shards of weights, or of something else of which every matrix has so much.
            sizes: elements of a matrix, by its number.

        Returns:
            The shards of matrices, in order; for each of `shards` their places among them.
        """
        result: list[Shard] = []
        places = []
        for shard in shards:
            begin, first = len(result), self._first[shard.index]
            result += _parts(shard, first, sizes[first])
            places.append(range(begin, len(result)))
        return result, places


def _parts(shard: Shard, first: int, size: int) -> Iterator[Shard]:
    if not shard.numel:
        yield replace(shard, index=first)
        return
    end = shard.offset + shard.numel
    for number in range(shard.offset // size, -(-end // size)):
        start = max(shard.offset, number * size)
        yield replace(
            shard,
            index=first + number,
            full_shape=(size,),
            offset=start - number * size,
            numel=min(end, (number + 1) * size) - start,
            start=shard.start + start - shard.offset,
        )


def rechunked(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield 1-D tensors that follow each other, cut anew into chunks of CHUNK elements, the last less.

    Of nothing, nothing is yielded.
    """
    held: list[Tensor] = []
    room = CHUNK
    for part in parts:
        rest = part
        while rest.numel() >= room:
            yield torch.cat([*held, rest[:room]]) if held else rest[:room]
            rest, held, room = rest[room:], [], CHUNK
        if rest.numel():
            held.append(rest)
            room -= rest.numel()
    if held:
        yield torch.cat(held) if len(held) > 1 else held[0]
