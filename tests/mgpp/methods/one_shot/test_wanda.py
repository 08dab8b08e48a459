"""Wanda against the paper's formula, weight by weight."""

import pytest
import torch

from mgpp import make_one_shot
from mgpp.methods.one_shot.wanda import wanda
from mgpp.pattern import NofM


def score(weight, inputs, i, j):
    """S_ij = |W_ij| ||X_j||_2, equation 1."""
    return abs(float(weight[i, j])) * sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5


@pytest.mark.parametrize("num_pruned", [0, 1, 29, 30, 59, 60])
def test_the_lowest_of_each_output_go(num_pruned):
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 12), torch.randn(40, 12) * torch.rand(12)
    method = make_one_shot("wanda")
    found = method.prune(weight, method.statistic(inputs).double(), num_pruned)
    counts = [int((~row).sum()) for row in found.keep]
    assert sum(counts) == num_pruned
    assert max(counts) - min(counts) <= 1
    largest = 0.0
    for i, count in enumerate(counts):
        order = sorted(range(12), key=lambda j: score(weight, inputs, i, j))
        assert [j for j in range(12) if not found.keep[i, j]] == sorted(order[:count])
        largest = max([largest, *(score(weight, inputs, i, j) for j in order[:count])])
    assert found.threshold == pytest.approx(largest, rel=1e-6)
    assert torch.equal(found.weight, weight * found.keep)
    assert not torch.signbit(found.weight[~found.keep]).any()


def test_with_a_pattern_the_lowest_of_each_group_go():
    torch.manual_seed(1)
    weight, inputs = torch.randn(3, 8), torch.randn(40, 8)
    method = make_one_shot("wanda", pattern="1:4")
    found = method.prune(weight, method.statistic(inputs).double(), 18)
    for i in range(3):
        for start in (0, 4):
            group = range(start, start + 4)
            best = max(group, key=lambda j: score(weight, inputs, i, j))
            assert [j for j in group if found.keep[i, j]] == [best]


def test_ties_and_zeros_are_counted():
    weight = torch.ones(4, 6)
    weight[0] = 0.0
    found = wanda(weight, torch.ones(6), num_pruned=13)
    assert int((~found.keep).sum()) == 13
    pattern = wanda(torch.ones(2, 8), torch.zeros(8), num_pruned=8, pattern=NofM(kept=2, of=4))
    assert pattern.keep.sum(dim=1).tolist() == [4, 4]
