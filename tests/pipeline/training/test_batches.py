"""Rows dealt out to steps and workers: nothing twice, nothing lost, the same on any number."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.batches import BatchPlan


def make_plan(num_rows=50, batch_size=8, micro_batch_size=2, world_size=2, seed=0):
    return BatchPlan(
        num_rows=num_rows,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        seed=seed,
    )


@st.composite
def plans(draw):
    micro_batch_size = draw(st.integers(1, 3))
    world_size = draw(st.sampled_from([1, 2, 4]))
    batch_size = micro_batch_size * world_size * draw(st.integers(1, 3))
    return make_plan(
        num_rows=draw(st.integers(batch_size, 4 * batch_size)),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        seed=draw(st.integers(0, 5)),
    )


@settings(deadline=None)
@given(plan=plans())
def test_an_epoch_takes_no_row_twice(plan):
    assert plan.steps_per_epoch == plan.num_rows // plan.batch_size
    for epoch in range(3):
        first = epoch * plan.steps_per_epoch
        rows = [
            row
            for step in range(first, first + plan.steps_per_epoch)
            for row in plan.rows_of_step(step)
        ]
        assert len(rows) == len(set(rows)) == plan.steps_per_epoch * plan.batch_size
        assert set(rows) <= set(range(plan.num_rows))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_an_epoch_of_whole_batches_is_a_permutation(seed):
    plan = make_plan(num_rows=48, seed=seed)
    epochs = [
        [row for step in range(6 * epoch, 6 * epoch + 6) for row in plan.rows_of_step(step)]
        for epoch in range(3)
    ]
    assert all(sorted(rows) == list(range(48)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(rows != list(range(48)) for rows in epochs)


def test_the_seed_chooses_the_order():
    orders = [make_plan(seed=seed).rows_of_step(0) for seed in range(20)]
    assert orders[3] == make_plan(seed=3).rows_of_step(0)
    assert len({tuple(order) for order in orders}) == 20


@settings(deadline=None)
@given(plan=plans())
def test_workers_and_micro_batches_make_up_the_batch_of_a_step(plan):
    num_steps = 2 * plan.steps_per_epoch
    by_rank = [
        list(islice(plan.micro_batches(rank, 0), num_steps * plan.accumulation))
        for rank in range(plan.world_size)
    ]
    assert plan.accumulation * plan.micro_batch_size * plan.world_size == plan.batch_size
    for step in range(num_steps):
        begin = step * plan.accumulation
        of_step = [
            micro for batches in by_rank for micro in batches[begin : begin + plan.accumulation]
        ]
        assert all(len(micro) == plan.micro_batch_size for micro in of_step)
        rows = [row for micro in of_step for row in micro]
        assert len(rows) == plan.batch_size
        assert sorted(rows) == sorted(plan.rows_of_step(step))
    assert all(len(batches) == num_steps * plan.accumulation for batches in by_rank)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_step_takes_the_same_rows_on_any_number_of_workers(micro_batch_size):
    one = make_plan(micro_batch_size=8, world_size=1)
    for world_size in (1, 2, 4):
        plan = make_plan(micro_batch_size=micro_batch_size, world_size=world_size)
        assert [plan.rows_of_step(s) for s in range(14)] == [one.rows_of_step(s) for s in range(14)]


@settings(deadline=None)
@given(plan=plans(), data=st.data())
def test_going_on_from_a_step_deals_what_the_whole_run_would_have(plan, data):
    num_steps = 3 * plan.steps_per_epoch
    first = data.draw(st.integers(0, num_steps))
    rank = data.draw(st.integers(0, plan.world_size - 1))
    whole = list(islice(plan.micro_batches(rank, 0), num_steps * plan.accumulation))
    rest = islice(plan.micro_batches(rank, first), (num_steps - first) * plan.accumulation)
    assert list(rest) == whole[first * plan.accumulation :]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "batch_size 8 must be a multiple of .* 3 x 2"),
        ({"batch_size": 8, "micro_batch_size": 8}, "batch_size 8 must be a multiple of .* 8 x 2"),
        ({"num_rows": 7}, "7 training rows do not fill one batch of 8"),
        ({"num_rows": 0}, "0 training rows do not fill one batch of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**sizes)
