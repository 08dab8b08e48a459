"""Brackets around patterns, in which bfloat16 counts as float32 does."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mgpp.sharding.counting import GREATEST
from mgpp.sharding.kth_smallest import _rounded, _widened

INFINITE = 0x7F800000
patterns = st.integers(0, GREATEST)


def rounded_by_torch(pattern):
    value = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
    return int(value.to(torch.bfloat16).view(torch.int16)) & 0x7FFF


@given(patterns)
def test_numbers_are_rounded_as_torch_does(pattern):
    if 0x00800000 <= pattern <= INFINITE:
        assert _rounded(pattern) == rounded_by_torch(pattern)


@given(patterns, patterns, patterns)
def test_a_number_lies_within_a_bracket_where_its_bfloat16_does(one, other, pattern):
    low, high = min(one, other), max(one, other)
    begin, end = _widened(low, high)
    assert begin <= low <= high <= end
    # About one bfloat16 number wider on either side, but for what is subnormal or not finite.
    assert low - begin <= 0x10000 or low < 0x00820000 or low >= INFINITE
    assert end - high <= 0x10000 or high < 0x00820000 or high >= INFINITE - 0x10000
    for each in (pattern, begin - 1, begin, end, end + 1):
        if 0 <= each <= GREATEST:
            half = rounded_by_torch(each)
            assert (half < _rounded(begin)) == (each < begin), each
            assert (half <= _rounded(end)) == (each <= end), each
