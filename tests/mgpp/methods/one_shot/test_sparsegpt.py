"""SparseGPT against the equations of the optimal brain surgeon, an inverse anew for every column."""

import pytest
import torch

from mgpp import make_one_shot
from mgpp.methods.one_shot.base import PrunedMatrix
from mgpp.methods.one_shot.sparsegpt import inverse_factor, sparsegpt


def correlated(num_tokens: int, num_inputs: int) -> torch.Tensor:
    mixing = torch.randn(num_inputs, num_inputs, dtype=torch.float64)
    scales = torch.logspace(0, 1, num_inputs, dtype=torch.float64)
    return torch.randn(num_tokens, num_inputs, dtype=torch.float64) @ mixing * scales


def surgeon(weight, hessian, count_of, damping, block_size, pattern):
    """Prune column by column: w_F -= w_c / [H_F^-1]_cc x (H_F^-1)_c,: (eq. 3), F being what is right.

    The weights that go are chosen among those of a block, or of a group, by w^2 / [H_F^-1]_cc (eq. 3).
    """
    weight = weight.clone()
    num_rows, num_columns = weight.shape
    unit = torch.eye(num_columns, dtype=torch.float64)
    hessian = hessian + damping * hessian.diagonal().mean() * unit
    inverses = [torch.linalg.inv(hessian[c:, c:]) for c in range(num_columns)]
    keep = torch.ones(num_rows, num_columns, dtype=torch.bool)
    for column in range(num_columns):
        span = range(column, min(column + (pattern[1] if pattern else block_size), num_columns))
        if column % (pattern[1] if pattern else block_size) == 0:
            scores = {
                (i, c): float(weight[i, c] ** 2 / inverses[c][0, 0])
                for i in range(num_rows)
                for c in span
            }
            if pattern:
                for i in range(num_rows):
                    lowest = sorted(span, key=lambda c: scores[i, c])[: pattern[1] - pattern[0]]
                    keep[i, lowest] = False
            else:
                for i, c in sorted(scores, key=scores.__getitem__)[: count_of(column)]:
                    keep[i, c] = False
        for i in range(num_rows):
            if not keep[i, column]:
                inverse = inverses[column]
                weight[i, column:] -= weight[i, column] / inverse[0, 0] * inverse[0]
    return weight * keep, keep


@pytest.mark.parametrize("block_size", [1, 4, 5, 16, 64])
def test_it_is_the_optimal_brain_surgeon_column_by_column(block_size):
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 16, dtype=torch.float64), correlated(200, 16)
    hessian = 2 * inputs.T @ inputs
    found = sparsegpt(weight, hessian, num_pruned=48, damping=0.05, block_size=block_size)

    def count_of(start: int) -> int:
        end = min(start + block_size, 16)
        return 48 * end // 16 - 48 * start // 16

    expected, keep = surgeon(weight, hessian, count_of, 0.05, block_size, None)
    assert torch.equal(found.keep, keep)
    assert int(keep.sum()) == 48
    torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-12)
    assert not found.weight[~keep].any()
    assert not torch.signbit(found.weight[~keep]).any()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_so_it_is_with_a_pattern(pattern):
    torch.manual_seed(1)
    weight, inputs = torch.randn(6, 16, dtype=torch.float64), correlated(200, 16)
    method = make_one_shot(
        {"name": "sparsegpt", "block_size": 8}, pattern=f"{pattern[0]}:{pattern[1]}"
    )
    statistic = method.statistic(inputs)
    assert torch.equal(statistic, inputs.T @ inputs)
    num_pruned = method.count(weight.numel(), 1 - pattern[0] / pattern[1])
    found = method.prune(weight, statistic, num_pruned)
    expected, keep = surgeon(weight, 2 * statistic, None, 0.01, 8, pattern)
    assert torch.equal(found.keep, keep)
    groups = found.keep.view(6, -1, pattern[1]).sum(dim=2)
    assert bool((groups == pattern[0]).all())
    torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-12)


def test_the_factor_is_that_of_the_inverse():
    torch.manual_seed(2)
    inputs = correlated(100, 12)
    hessian = inputs.T @ inputs
    upper = inverse_factor(hessian, 0.1)
    assert torch.equal(upper, upper.triu())
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_its_outputs_are_nearer_than_wanda_s_and_those_nearer_than_magnitude_s(pattern):
    torch.manual_seed(3)
    shared = torch.randn(500, 8) @ torch.randn(8, 64)
    weight, inputs = (
        torch.randn(32, 64),
        (torch.randn(500, 64) + shared) * torch.linspace(0.2, 2, 64),
    )
    num_pruned = weight.numel() // 2
    errors = []
    for name in ("sparsegpt", "wanda"):
        method = make_one_shot({"name": name}, pattern=pattern)
        found = method.prune(weight, method.statistic(inputs).double(), num_pruned)
        errors.append(error_of(found, weight, inputs))
    wanda = make_one_shot("wanda", pattern=pattern)
    by_magnitude = wanda.prune(weight, torch.ones(64, dtype=torch.float64), num_pruned)
    errors.append(error_of(by_magnitude, weight, inputs))
    assert errors == sorted(errors)
    assert errors[0] < 0.5 * errors[1]


def error_of(found: PrunedMatrix, weight, inputs) -> float:
    return float(((weight - found.weight) @ inputs.T).square().sum())


def test_inputs_that_are_always_zero_are_pruned_first_and_counted():
    torch.manual_seed(4)
    weight, inputs = torch.randn(4, 8), torch.randn(50, 8)
    inputs[:, 2] = 0.0
    found = sparsegpt(weight, 2 * inputs.T @ inputs, num_pruned=4, damping=1e-5)
    assert found.keep.sum() == 28
    assert not found.keep[:, 2].any()


def test_a_hessian_that_does_not_do():
    hessian = -torch.eye(4)
    with pytest.raises(ValueError, match=r"not positive definite; raise damping \(got 0\.01\)"):
        sparsegpt(torch.randn(2, 4), hessian, num_pruned=4)
