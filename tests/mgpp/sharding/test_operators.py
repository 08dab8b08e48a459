"""The operators in plain torch: against brute force, and what torch is given to know of them."""

import numpy as np
import pytest
import torch

from mgpp.masking import lamp  # noqa: F401  # defines two of them
from mgpp.sharding.bitmask import pack_bits, unpack_bits
from mgpp.sharding.masks import compare_masks, keep_above, zero_pruned_
from mgpp.sharding.stacks import Stacks, runs

VALUES = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (17, 40, 0)]
PLACES = [
    0,
    0,
    17,
    1,
    5,
    20,
    4,
    3,
    9,
]  # a matrix; three of a stack, from the first one's sixth element; none
KEEP = [pack_bits(torch.rand(len(v)) < 0.5) for v in VALUES]
INT64 = 1 << 64


def mixed(number):
    """SplitMix64 in Python's integers, with arithmetic shifts."""

    def signed(value):
        return (value + INT64 // 2) % INT64 - INT64 // 2

    value = signed((number + 1) * -0x61C8864680B583EB)
    value = signed((value ^ (value >> 31)) * -0x4B47D0C1A1E98BB9)
    return (value ^ (value >> 29)) | 1


@pytest.mark.parametrize("first", [0, 3, 1000])
def test_the_hash_is_the_sum_over_pruned_weights_of_their_bytes_factors(first):
    found = compare_masks(KEEP, KEEP, [len(v) for v in VALUES], [first, 70, 200])[0, 0]
    pruned = (~unpack_bits(KEEP[0], 17)).nonzero().squeeze(1) + first
    expected = sum((1 << at % 8) * mixed(at // 8) for at in pruned.tolist())
    assert int(found) % INT64 == expected % INT64


def test_masks_are_compared_bit_by_bit():
    before = [pack_bits(torch.rand(len(v)) < 0.5) for v in VALUES]
    _, *found = compare_masks(KEEP, before, [17, 40, 0], [0, 17, 57]).tolist()
    for i, masks in enumerate(zip(KEEP, before, strict=True)):
        new, old = (np.unpackbits(mask.numpy()).astype(bool) for mask in masks)
        assert [row[i] for row in found] == [new.sum(), old.sum(), (old & ~new).sum()]


def test_ranges_of_matrices_with_the_same_key_are_one():
    found = list(runs(VALUES, PLACES, ["a", "a", "b", "b", "c"]))
    assert found == [(0, 0, 17, "a"), (1, 0, 15, "a"), (1, 15, 40, "b")]


def test_stacks_that_hold_some_matrices():
    stacks = Stacks(values=VALUES, places=PLACES, num_matrices=5, device=torch.device("cpu"))
    some = stacks.holding({2, 4})
    assert some.values == [VALUES[1]]
    assert some.places == [1, 5, 20]


def test_what_is_kept_lies_above_the_cut_or_equals_it_from_a_place_on():
    values = [v.round(decimals=0) for v in VALUES]
    cuts = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0])
    until = torch.tensor([9, 0, 20, 1 << 62, 0])
    found = keep_above(values, PLACES, cuts.view(torch.int32), until)
    for value, mask, (first, offset, size) in zip(
        values, found, zip(PLACES[::3], PLACES[1::3], PLACES[2::3], strict=True), strict=True
    ):
        for at, (magnitude, kept) in enumerate(
            zip(value.abs().tolist(), unpack_bits(mask, len(value)).tolist(), strict=True)
        ):
            matrix = first + (offset + at) // size
            cut = float(cuts[matrix])
            assert kept == (magnitude > cut or (magnitude == cut and at >= until[matrix]))


def test_pruned_weights_become_plus_zero_whatever_they_were():
    weights = [torch.tensor([float("nan"), -float("inf"), -1.0, -0.0, 5.0])]
    zero_pruned_(weights, [pack_bits(torch.tensor([False, False, False, True, True]))])
    assert torch.equal(weights[0], torch.tensor([0.0, 0.0, 0.0, -0.0, 5.0]))
    assert torch.signbit(weights[0]).tolist() == [False, False, False, True, False]


CUTS, COUNTS = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
ARGUMENTS = {
    "zero_pruned_": (VALUES, KEEP),
    "keep_above": (VALUES, PLACES, CUTS, COUNTS),
    "compare_masks": (KEEP, KEEP, [17, 40, 0], [0, 17, 57]),
    "count_digits": (VALUES, PLACES, COUNTS, COUNTS[:1], 20, 2048),
    "count_around": (VALUES, PLACES, CUTS),
    "nth_equal": (VALUES, PLACES, CUTS, COUNTS),
    "count_displacements": (VALUES, PLACES, KEEP, torch.ones(5)),
    "largest_patterns": (VALUES, PLACES, 5),
    "count_magnitudes": (VALUES, PLACES, COUNTS + (0x40A00000 >> 17) - 2047, 0, 5),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_torch_knows_what_an_operator_changes_and_returns(name):
    checks = ("test_schema", "test_faketensor")
    arguments = [
        [t.clone() for t in a] if isinstance(a, list) and isinstance(a[0], torch.Tensor) else a
        for a in ARGUMENTS[name]
    ]
    torch.library.opcheck(getattr(torch.ops.mgpp, name).default, arguments, test_utils=checks)
