"""What one-shot methods share: a matrix and statistics of its inputs in, the pruned matrix out.

Nothing is trained: each matrix is pruned once, from what calibration text sends through it. All counts
are integers, so that they add up: see `portions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from mgpp.pattern import Blocks, NofM, parse_pattern
from mgpp.settings import check_limits


@dataclass(frozen=True, kw_only=True)
class PrunedMatrix:
    """A matrix after pruning.

    Attributes:
        weight: [out, in], as it was given, +0.0 where pruned.
        keep: [out, in] bool, True = kept.
        threshold: the largest score that was pruned; 0 where nothing was.
    """

    weight: Tensor
    keep: Tensor
    threshold: float


@dataclass(kw_only=True, eq=False)
class OneShotMethod:
    """A method that prunes each matrix once; its fields declared by `setting` are its settings.

    Attributes:
        name: the registry's name of the method.
        title: what people call it.
        pattern: N:M sparsity, such as "2:4": of every M consecutive inputs of an output, N are kept;
            sparsity must then be 1 - N/M. Any weight may be pruned unless given.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    pattern: str | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: naming the first that is wrong.
        """
        check_limits(self)
        pattern = None if self.pattern is None else parse_pattern(self.pattern)
        if isinstance(pattern, Blocks):
            raise ValueError(  # noqa: TRY004 - the value is wrong, not its type
                f'pattern: got {self.pattern!r}; {self.name} prunes single weights or by N:M ("2:4")'
            )
        self._pattern = pattern

    def count(self, num_prunable: int, sparsity: float) -> int:
        """Return how many of all prunable weights are pruned: floor(num_prunable x sparsity).

        Raises:
            ValueError: if the sparsity is not the pattern's.
        """
        pattern = self._pattern
        if pattern is None:
            return int(num_prunable * sparsity)
        if abs(sparsity - (1 - pattern.kept / pattern.of)) > 1e-4:
            raise ValueError(
                f"sparsity: got {sparsity}, but pattern {self.pattern} prunes "
                f"{1 - pattern.kept / pattern.of:.4g} of the weights"
            )
        return num_prunable * (pattern.of - pattern.kept) // pattern.of

    def check_shape(self, in_features: int) -> None:
        """Check that matrices of so many inputs can be pruned.

        Raises:
            ValueError: if the pattern does not divide the inputs.
        """
        if self._pattern is not None and in_features % self._pattern.of:
            raise ValueError(
                f"pattern {self.pattern} needs inputs in groups of {self._pattern.of}, got {in_features} "
                "inputs"
            )

    def statistic_shape(self, in_features: int) -> tuple[int, ...]:
        """Return the shape of the statistic."""
        raise NotImplementedError

    def statistic(self, inputs: Tensor) -> Tensor:
        """Return what is summed over all tokens, of some: `inputs` is [tokens, in], float32."""
        raise NotImplementedError

    def prune(self, weight: Tensor, statistic: Tensor, num_pruned: int) -> PrunedMatrix:
        """Prune a matrix.

        Args:
            weight: [out, in], float32 (or float64, in which all is then computed).
            statistic: the sum of `statistic` over all tokens, float64.
            num_pruned: how many weights are pruned.

        Raises:
            ValueError: if the statistic does not allow it.
        """
        raise NotImplementedError


def portions(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide `total` among parts by their sizes: up to each part's end, the floor of the share so far.

    So portions add up to `total`, each is within one of its exact share, and none exceeds its part. A
    model's count is divided among its matrices so, and a matrix's among its rows or blocks.

    Args:
        total: at most the sum of the sizes.
        sizes: elements of each part.
    """
    ends = list(accumulate(sizes, initial=0))
    assert total <= ends[-1], (total, ends[-1])
    return [total * end // ends[-1] - total * start // ends[-1] for start, end in pairwise(ends)]


def lowest(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Mark the `counts` lowest scores of each row; of equal ones the first.

    Args:
        scores: [rows, n].
        counts: [rows] int64, or one for all.

    Returns:
        [rows, n] bool.
    """
    places = torch.arange(scores.shape[1], device=scores.device)
    wanted = places < (counts if isinstance(counts, int) else counts.unsqueeze(1))
    order = scores.argsort(dim=1, stable=True)
    marked = torch.zeros_like(scores, dtype=torch.bool)
    return marked.scatter_(1, order, wanted.expand_as(order))


def lowest_in_groups(scores: Tensor, pattern: NofM) -> Tensor:
    """Mark what does not stay of each group of `pattern.of` neighbours in a row; as `lowest` does."""
    groups = scores.reshape(-1, pattern.of)
    return lowest(groups, pattern.of - pattern.kept).view_as(scores)


def largest(scores: Tensor, marked: Tensor) -> float:
    """Return the largest of the marked scores; 0 where none is marked."""
    return float(scores[marked].max()) if bool(marked.any()) else 0.0
