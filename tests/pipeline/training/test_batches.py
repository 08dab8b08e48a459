"""Rows dealt out to steps and workers: nothing twice, nothing lost, the same on any number."""

from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset as Rows
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.base import DRAW_SEED
from pipeline.training.batches import BatchPlan, DrawnRows, loaded, num_loaders


def make_plan(num_rows=50, batch_size=8, micro_batch_size=2, world_size=2, seed=0, lengths=None):
    return BatchPlan(
        num_rows=num_rows,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        seed=seed,
        lengths=lengths,
    )


def phrase_lengths(num_rows, seed=0):
    """Lengths as those of SST-2's phrases: 10 words in the middle, a tail to 60."""
    drawn = np.random.default_rng(seed).lognormal(np.log(10), 0.7, num_rows)
    return torch.from_numpy(np.clip(drawn, 3, 60).astype(np.int64))


@st.composite
def plans(draw):
    micro_batch_size = draw(st.integers(1, 3))
    world_size = draw(st.sampled_from([1, 2, 4]))
    batch_size = micro_batch_size * world_size * draw(st.integers(1, 3))
    num_rows = draw(st.integers(batch_size, 4 * batch_size))
    return make_plan(
        num_rows=num_rows,
        lengths=phrase_lengths(num_rows) if draw(st.booleans()) else None,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        seed=draw(st.integers(0, 5)),
    )


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


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_an_epoch_of_whole_batches_is_a_permutation(seed, grouped):
    plan = make_plan(num_rows=48, seed=seed, lengths=phrase_lengths(48) if grouped else None)
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


@pytest.mark.parametrize("lengths", [None, phrase_lengths(50)])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_step_takes_the_same_rows_on_any_number_of_workers(micro_batch_size, lengths):
    one = make_plan(micro_batch_size=8, world_size=1, lengths=lengths)
    for world_size in (1, 2, 4):
        plan = make_plan(micro_batch_size=micro_batch_size, world_size=world_size, lengths=lengths)
        assert [plan.rows_of_step(s) for s in range(14)] == [one.rows_of_step(s) for s in range(14)]


@given(plan=plans(), data=st.data())
def test_going_on_from_a_step_deals_what_the_whole_run_would_have(plan, data):
    num_steps = 3 * plan.steps_per_epoch
    first = data.draw(st.integers(0, num_steps))
    rank = data.draw(st.integers(0, plan.world_size - 1))
    whole = list(islice(plan.micro_batches(rank, 0), num_steps * plan.accumulation))
    rest = islice(plan.micro_batches(rank, first), (num_steps - first) * plan.accumulation)
    assert list(rest) == whole[first * plan.accumulation :]


def padding(plan, lengths, num_epochs=2):
    """Share of what is computed that is padding, each worker padding to its longest row."""
    padded = tokens = 0
    for rank in range(plan.world_size):
        batches = islice(
            plan.micro_batches(rank, 0), num_epochs * plan.steps_per_epoch * plan.accumulation
        )
        for rows in batches:
            of_rows = lengths[rows]
            padded += len(rows) * int(of_rows.max())
            tokens += int(of_rows.sum())
    return 1 - tokens / padded


@pytest.mark.parametrize("world_size", [1, 2])
def test_grouping_leaves_little_padding(world_size):
    lengths = phrase_lengths(20_000)
    sizes = {"num_rows": 20_000, "batch_size": 32, "micro_batch_size": 16, "world_size": world_size}
    assert padding(make_plan(**sizes), lengths) > 0.5
    assert padding(make_plan(**sizes, lengths=lengths), lengths) < 0.05


def test_grouped_batches_come_in_no_order_of_length():
    lengths = phrase_lengths(3_200)
    plan = make_plan(num_rows=3_200, batch_size=32, lengths=lengths)
    means = [float(lengths[plan.rows_of_step(step)].float().mean()) for step in range(100)]
    ranks = np.argsort(np.argsort(means))
    assert abs(np.corrcoef(ranks, np.arange(100))[0, 1]) < 0.3


def test_grouped_rows_meet_other_rows_in_the_next_epoch():
    plan = make_plan(num_rows=3_200, batch_size=32, lengths=phrase_lengths(3_200))
    epochs = [
        {frozenset(plan.rows_of_step(100 * epoch + step)) for step in range(100)}
        for epoch in range(2)
    ]
    assert not epochs[0] & epochs[1]


def test_lengths_are_those_of_the_rows():
    with pytest.raises(ValueError, match="49 lengths were given for 50 rows"):
        make_plan(lengths=phrase_lengths(49))


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


def _padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(ids),
        "draws": torch.tensor([row[DRAW_SEED] % 997 for row in rows]),
    }


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("cores", [1, 3])
def test_processes_that_make_a_gpu_s_batches_make_the_same_in_order(cores, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert num_loaders() == cores - 1
    rows = DrawnRows(Rows.from_list([{"input_ids": [i] * (1 + i % 5)} for i in range(40)]))
    plan = BatchPlan(num_rows=40, batch_size=8, micro_batch_size=4, world_size=1, seed=3)
    made = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        batches = plan.drawn_micro_batches(0, 7)
        made[device] = list(islice(loaded(rows, batches, _padded, torch.device(device)), 15))
        made[device].append({"next draw": torch.rand(1)})
    for on_cpu, on_gpu in zip(made["cpu"], made["cuda"], strict=True):
        assert on_cpu.keys() == on_gpu.keys()
        assert all(torch.equal(on_cpu[name], on_gpu[name]) for name in on_cpu)


def test_a_machine_of_many_cores_has_few_of_them(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    assert num_loaders() == 4
