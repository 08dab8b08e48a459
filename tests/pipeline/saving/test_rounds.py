"""Every element is written once, by one worker, in rounds no larger than asked for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.saving.contents import Spec, Unit
from pipeline.saving.rounds import plan_saving

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SIZES = st.tuples(st.integers(0, 300), st.sampled_from(DTYPES), st.booleans(), st.booleans())


def unit(number, numel, dtype, direct=True, buffer=False):
    spec = Spec(dtype, (numel,))
    name = f"t{number}"
    return Unit(
        sources={name: spec}, keys=(name,), outputs={name: spec}, direct=direct, buffer=buffer
    )


@given(st.lists(SIZES, max_size=12), st.integers(1, 5), st.integers(1, 2000))
def test_rounds_hold_every_element_once(sizes, world_size, round_bytes):
    units = [unit(i, *size) for i, size in enumerate(sizes)]
    plan = plan_saving(units, world_size, round_bytes)
    assert 1 <= len(plan.owners) <= world_size
    assert sorted(u.keys for owned in plan.owners for u in owned) == sorted(u.keys for u in units)
    for rank, owned in enumerate(plan.owners):
        parts = [part for round_ in plan.rounds for part in round_[rank]]
        # In the order of the file, each tensor from its first element to its last.
        assert [u.keys[0] for u in owned if u.nbytes] == list(
            dict.fromkeys(part.source for part in parts if part.end > part.begin)
        )
        for one in owned:
            (name,) = one.sources
            ends = [(part.begin, part.end) for part in parts if part.source == name]
            assert [begin for begin, _ in ends] == [0, *(end for _, end in ends)][: len(ends)]
            if ends:
                assert ends[-1][1] == one.sources[name].numel
    for round_ in plan.rounds:
        assert len(round_) == len(plan.owners)
        for parts in round_:
            sizes_of = [(p.end - p.begin) * p.unit.sources[p.source].dtype.itemsize for p in parts]
            if len(parts) > 1:
                assert all(part.unit.direct for part in parts)
            if parts and parts[0].unit.direct:
                # An element is never cut, however small a round is.
                assert sum(sizes_of) <= max(round_bytes // len(plan.owners), 8)


@given(st.lists(st.integers(1, 300), min_size=4, max_size=30), st.integers(1, 4))
def test_files_are_balanced_up_to_the_largest_tensor(sizes, world_size):
    units = [unit(i, size, torch.float32) for i, size in enumerate(sizes)]
    plan = plan_saving(units, world_size, 16)
    loads = [sum(u.nbytes for u in owned) for owned in plan.owners]
    assert max(loads) - min(loads) <= 4 * max(sizes)


def test_a_model_smaller_than_a_round_is_one_file_and_buffers_are_the_first_workers():
    small = [unit(i, 10, torch.float32) for i in range(4)]
    assert len(plan_saving(small, 8).owners) == 1
    buffers = [unit(i, 10, torch.float32, buffer=True) for i in range(4)]
    many = plan_saving([*small[:2], *buffers[2:]], 2, 8)
    assert {u.keys for u in buffers[2:]} <= {u.keys for u in many.owners[0]}
