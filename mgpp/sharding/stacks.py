"""Values by matrix: what a rank holds of a weight is a range of a matrix, or of a stack of matrices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mgpp.kernels.devices import moved


@dataclass(frozen=True, kw_only=True)
class Stacks:
    """Ranges of stacks of matrices, each the only range of its matrices on this rank.

    Attributes:
        values: 1-D float32, all on `device`: what is counted or cut.
        places: three integers for each: the number of the stack's first matrix, the element of the stack
            with which the range begins, and the elements of each of its matrices.
        num_matrices: of all stacks, over all ranks; their numbers are below it.
        device: of the values; where there are none, that of counts of none.
    """

    values: list[Tensor]
    places: list[int]
    num_matrices: int
    device: torch.device

    def holding(self, numbers: set[int]) -> "Stacks":
        """Return the ranges in which any of some matrices lie."""
        wanted = [number in numbers for number in range(self.num_matrices)]
        found = runs(self.values, self.places, wanted)
        which = sorted({which for which, _, _, is_wanted in found if is_wanted})
        return Stacks(
            values=[self.values[w] for w in which],
            places=[number for w in which for number in self.places[3 * w : 3 * w + 3]],
            num_matrices=self.num_matrices,
            device=self.device,
        )

    def of_matrices(self, numbers: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Return numbers, one a matrix, on the device of the values."""
        return moved(torch.tensor(numbers, dtype=dtype), self.device)


def runs(
    values: Sequence[Tensor], places: Sequence[int], keys: Sequence[Any]
) -> Iterator[tuple[int, int, int, Any]]:
    """Yield (which range, first element, end, key): matrices that follow each other with the same key.

    Args:
        values: as in `Stacks`.
        places: likewise.
        keys: by the matrices' numbers.
    """
    stacks = zip(values, places[::3], places[1::3], places[2::3], strict=True)
    for which, (value, first, offset, size) in enumerate(stacks):
        end = offset + value.numel()
        numbers = range(first + offset // size, first - -end // size if len(value) else 0)
        for key, members in groupby(numbers, key=keys.__getitem__):
            same = list(members)
            begin, stop = (same[0] - first) * size, (same[-1] + 1 - first) * size
            yield which, max(begin, offset) - offset, min(stop, end) - offset, key
