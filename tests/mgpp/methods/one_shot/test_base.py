"""Counts that add up, ties that go in order, and settings that are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mgpp import ONE_SHOT, make_one_shot
from mgpp.methods.one_shot.base import largest, lowest, lowest_in_groups, portions
from mgpp.pattern import parse_pattern


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0, 1))
def test_portions_add_up_and_none_is_off_by_one(sizes, share):
    total = int(sum(sizes) * share)
    found = portions(total, sizes)
    assert sum(found) == total
    for portion, size in zip(found, sizes, strict=True):
        assert 0 <= portion <= size
        assert abs(portion - total * size / sum(sizes)) < 1


def test_the_lowest_go_and_of_ties_the_first():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0], [0.0, 0.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    found = lowest(scores, torch.tensor([2, 2, 0]))
    assert found.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert lowest(scores, 1).int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert largest(scores, found) == 1.0
    assert largest(scores, torch.zeros_like(found)) == 0.0


def test_of_each_group_as_many_stay_as_the_pattern_says():
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0, 5.0, 5.0, 5.0, 4.0]])
    assert lowest_in_groups(scores, parse_pattern("2:4")).int().tolist() == [
        [0, 1, 0, 1, 1, 0, 0, 1]
    ]
    assert lowest_in_groups(scores, parse_pattern("1:4")).int().tolist() == [
        [0, 1, 1, 1, 1, 1, 0, 1]
    ]


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2/4", "2:4:8", "", "32x1"])
@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_pattern_that_is_none(name, text):
    with pytest.raises(ValueError, match=f"pattern: got {text!r}"):
        make_one_shot({"name": name}, pattern=text)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_the_count_is_the_floor_and_a_pattern_s_is_its_own(name):
    assert make_one_shot(name).count(1001, 0.5) == 500
    method = make_one_shot({"name": name}, pattern="2:4")
    assert method.count(64, 0.5) == 32
    with pytest.raises(ValueError, match=r"sparsity: got 0\.6, but pattern 2:4 prunes 0\.5"):
        method.count(64, 0.6)
    method.check_shape(16)
    with pytest.raises(ValueError, match="needs inputs in groups of 4, got 18 inputs"):
        method.check_shape(18)


def test_names_and_settings_that_there_are_not():
    with pytest.raises(ValueError, match="got 'obc'; allowed are wanda, sparsegpt"):
        make_one_shot("obc")
    with pytest.raises(ValueError, match="damping is no setting of wanda; allowed are none"):
        make_one_shot({"name": "wanda", "damping": 0.1})
    with pytest.raises(ValueError, match="damping must be greater than 0, got 0"):
        make_one_shot({"name": "sparsegpt", "damping": 0})
    with pytest.raises(
        ValueError, match="block_size must be a multiple of 4 for pattern 2:4, got 6"
    ):
        make_one_shot({"name": "sparsegpt", "block_size": 6}, pattern="2:4")
