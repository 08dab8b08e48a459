"""Wanda: pruning by weights and activations (Sun, Liu, Bair, Kolter, arXiv 2306.11695)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpp.methods.one_shot.base import (
    OneShotMethod,
    PrunedMatrix,
    largest,
    lowest,
    lowest_in_groups,
    portions,
)
from mgpp.pattern import NofM


@dataclass(kw_only=True, eq=False)
class Wanda(OneShotMethod):
    """Wanda: by |w| times the norm of its input, compared within each output; no weight is changed."""

    name = "wanda"
    title = "Wanda"

    def statistic_shape(self, in_features: int) -> tuple[int, ...]:
        """Return [in]."""
        return (in_features,)

    def statistic(self, inputs: Tensor) -> Tensor:
        """Return the sum of squares of each input, [in]."""
        return inputs.square().sum(dim=0)

    def prune(self, weight: Tensor, statistic: Tensor, num_pruned: int) -> PrunedMatrix:
        """Prune a matrix by the norms of its inputs."""
        norms = statistic.sqrt().to(weight.dtype)
        return wanda(weight, norms, num_pruned=num_pruned, pattern=self._pattern)


def wanda(
    weight: Tensor, input_norms: Tensor, *, num_pruned: int, pattern: NofM | None = None
) -> PrunedMatrix:
    """Prune by S_ij = |W_ij| ||X_j||_2 (eq. 1), the lowest of each output, or of each group of one.

    Args:
        weight: W, [out, in].
        input_norms: ||X_j||_2 over all tokens, [in].
        num_pruned: how many weights are pruned; outputs differ by at most one. With a pattern it
            follows from that.
        pattern: N:M sparsity instead.
    """
    scores = weight.abs() * input_norms
    if pattern is None:
        num_rows, num_columns = weight.shape
        counts = torch.tensor(portions(num_pruned, [num_columns] * num_rows), device=weight.device)
        pruned = lowest(scores, counts)
    else:
        pruned = lowest_in_groups(scores, pattern)
    assert int(pruned.sum()) == num_pruned
    return PrunedMatrix(
        weight=weight.masked_fill(pruned, 0.0),
        keep=~pruned,
        threshold=largest(scores, pruned),
    )
