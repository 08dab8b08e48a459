"""SparseGPT: one-shot pruning with error compensation (Frantar & Alistarh, arXiv 2301.00774)."""

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
from mgpp.settings import setting


@dataclass(kw_only=True, eq=False)
class SparseGPT(OneShotMethod):
    """SparseGPT: by the error a weight's loss leaves, which the weights after it make up for."""

    name = "sparsegpt"
    title = "SparseGPT"

    damping: float = setting(
        0.01, "Added to the Hessian's diagonal, as a share of the diagonal's mean.", gt=0
    )
    block_size: int = setting(
        128, "Inputs whose weights are chosen at a time, over all outputs together.", ge=1
    )

    def __post_init__(self) -> None:
        """Check the settings, also with each other."""
        super().__post_init__()
        if self._pattern is not None and self.block_size % self._pattern.of:
            raise ValueError(
                f"block_size must be a multiple of {self._pattern.of} for pattern {self.pattern}, got "
                f"{self.block_size}"
            )

    def statistic_shape(self, in_features: int) -> tuple[int, ...]:
        """Return [in, in]."""
        return (in_features, in_features)

    def statistic(self, inputs: Tensor) -> Tensor:
        """Return X X^T of these tokens, [in, in]; the paper's X has tokens as columns."""
        return inputs.T @ inputs

    def prune(self, weight: Tensor, statistic: Tensor, num_pruned: int) -> PrunedMatrix:
        """Prune a matrix by the Hessian H = 2 X X^T of its error."""
        return sparsegpt(
            weight,
            (2 * statistic).to(weight.dtype),
            num_pruned=num_pruned,
            damping=self.damping,
            block_size=self.block_size,
            pattern=self._pattern,
        )


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    num_pruned: int,
    damping: float = 0.01,
    block_size: int = 128,
    pattern: NofM | None = None,
) -> PrunedMatrix:
    """Prune the columns from left to right, each error made up for by the columns right of it (alg. 1).

    At the first column of a block, those of its weights are pruned that have the lowest
    w^2 / [H_F^-1]_cc, F being the columns from c on: what the squared error of the outputs rises by when
    w is pruned and F makes up for it. With a pattern they are chosen at the first column of each group.
    The weights of one row are compared with those of all others.

    Args:
        weight: W, [out, in].
        hessian: H = 2 X X^T, [in, in], in the dtype of the weight; any positive multiple does.
        num_pruned: how many are pruned; blocks get shares by their size. With a pattern it follows
            from that.
        damping: lambda, as a share of the mean of H's diagonal.
        block_size: B = B_s, columns.
        pattern: N:M sparsity instead.

    Raises:
        ValueError: if the damped Hessian is not positive definite.
    """
    factor = inverse_factor(hessian, damping)
    weight = weight.clone()
    num_rows, num_columns = weight.shape
    starts = range(0, num_columns, block_size)
    sizes = [min(block_size, num_columns - start) for start in starts]
    counts = portions(num_pruned, [num_rows * size for size in sizes])
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    threshold = 0.0
    for start, size, count in zip(starts, sizes, counts, strict=True):
        end = start + size
        marked, errors, score = _sweep_block(
            weight[:, start:end], factor[start:end, start:end], count, pattern
        )
        pruned[:, start:end] = marked
        threshold = max(threshold, score)
        weight[:, end:] -= errors @ factor[start:end, end:]
    weight.masked_fill_(pruned, 0.0)
    assert int(pruned.sum()) == num_pruned
    return PrunedMatrix(weight=weight, keep=~pruned, threshold=threshold)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U = (H + lambda I)^-1.

    From the Cholesky factor of H read backwards: H = R R^T with R upper triangular, so U = R^-1. That is
    one factorization, and H^-1 itself is not formed. With F the columns from c on, U_cc^2 is
    [H_F^-1]_cc, and U_cc times the row U_c,F is the row c of H_F^-1.

    Raises:
        ValueError: if it is not positive definite.
    """
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag_embed((damping * diagonal.mean()).expand_as(diagonal))
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise ValueError(
            "the Hessian of the calibration inputs is not positive definite; raise damping (got "
            f"{damping}) or calibrate on more rows"
        )
    unit = torch.eye(len(diagonal), dtype=hessian.dtype, device=hessian.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
    return factor


def _sweep_block(
    weight: Tensor, factor: Tensor, count: int, pattern: NofM | None
) -> tuple[Tensor, Tensor, float]:
    """Prune a block's columns, and make up for each within the block, in place.

    Returns:
        What was pruned, [out, size] bool; each column's error over U_cc, [out, size]; the largest score
        that was pruned.
    """
    diagonal = factor.diagonal()
    errors = torch.zeros_like(weight)
    threshold = 0.0
    marked = torch.zeros_like(weight, dtype=torch.bool)
    if pattern is None:
        scores = (weight / diagonal).square()
        marked = lowest(scores.reshape(1, -1), count).view_as(weight)
        threshold = largest(scores, marked)
    for column in range(weight.shape[1]):
        if pattern is not None and column % pattern.of == 0:
            group = slice(column, column + pattern.of)
            scores = (weight[:, group] / diagonal[group]).square()
            marked[:, group] = lowest_in_groups(scores, pattern)
            threshold = max(threshold, largest(scores, marked[:, group]))
        error = weight[:, column] * marked[:, column] / diagonal[column]
        weight[:, column:] -= error.unsqueeze(1) * factor[column, column:]
        errors[:, column] = error
    return marked, errors, threshold
