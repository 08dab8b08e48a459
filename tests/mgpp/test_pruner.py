import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mgpp import GMP, MGPP, PLATON, Collectives, Placement, Pruner, PruningSchedule
from mgpp.backends.torch import attach
from mgpp.sharding.displacement import displacement_quantile
from tests.mgpp.ranks import contiguous_shards, odd_shards, per_weight_shards, run_ranks

SCHEDULE = PruningSchedule(
    num_steps=12,
    warmup_steps=2,
    finetune_steps=3,
    interval=3,
    initial_sparsity=0.2,
    final_sparsity=0.7,
)


def make_weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((9, 7), (5, 3), (4, 33))]


def make_pruner(weights, collectives, cut_into):
    shards = cut_into(weights, collectives.rank, collectives.world_size)
    shapes = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
    return Pruner(shards, shapes, method=GMP(), schedule=SCHEDULE, collectives=collectives)


def test_exactly_k_weights_are_pruned_at_every_pruning():
    model = nn.Sequential(*[nn.Linear(13, 13) for _ in range(3)])
    prunable = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = attach(optimizer, prunable, method=MGPP(num_examples=50), schedule=SCHEDULE)
    for step in range(SCHEDULE.num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 13)).square().mean().backward()
        optimizer.step()
        if SCHEDULE.is_pruning_step(step):
            k = int(3 * 169 * SCHEDULE.sparsity(step))
            assert pruner.last_pruning is not None
            assert (pruner.last_pruning.step, pruner.last_pruning.num_pruned) == (step, k)
            assert pruner.num_zeros() == k
            assert sum(int((p == 0).sum()) for p in prunable.values()) == k
    assert pruner.num_zeros() == int(3 * 169 * 0.7)  # held by the fixed mask
    assert pruner.mask_sparsity == pruner.sparsity() == int(3 * 169 * 0.7) / (3 * 169)
    assert pruner.finish() == pruner.sparsity()
    zeros = torch.cat([p.detach().view(-1) for p in prunable.values()])
    assert not torch.signbit(zeros[zeros == 0]).any()


def test_weights_may_come_back_between_prunings_and_not_after_the_last():
    weight = nn.Parameter(torch.linspace(0.1, 1, 20).view(4, 5))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    pruner = attach(optimizer, {"w": weight}, method=GMP(), schedule=SCHEDULE)
    for step in range(SCHEDULE.num_steps):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
        if step in (4, 10, 11):
            assert pruner.num_zeros() == (14 if step > 8 else 0)


def loop_of(num_steps):
    """Train a matrix for some steps, each of which moves all its weights."""
    weight = nn.Parameter(torch.linspace(0.1, 1, 20).view(4, 5))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    pruner = attach(optimizer, {"w": weight}, method=GMP(), schedule=SCHEDULE)
    for _ in range(num_steps):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    return pruner, weight


@pytest.mark.parametrize("num_steps", [0, 2, 7, 8])
def test_a_loop_that_ends_before_the_last_pruning_is_found_out(num_steps):
    pruner, weight = loop_of(num_steps)
    assert pruner.sparsity() == int((weight == 0).sum()) / weight.numel()
    with pytest.raises(
        RuntimeError, match=rf"ended after {num_steps} optimizer steps, before the last"
    ):
        pruner.finish()


def test_sparsity_is_counted_and_that_of_the_mask_has_its_own_name():
    pruner, weight = loop_of(8)  # the last pruning but one was at the end of step 6
    assert pruner.mask_sparsity > 0.6
    assert pruner.sparsity() == 0 == int((weight == 0).sum())


def test_a_loop_that_ends_with_a_fixed_mask_but_early_is_warned_of():
    pruner, _ = loop_of(10)
    with pytest.warns(UserWarning, match="ended after 10 of 12 announced optimizer steps"):
        assert pruner.finish() == 0.7
    pruner, _ = loop_of(12)
    assert pruner.finish() == 0.7


def test_weights_put_back_after_the_last_step_are_found_out():
    pruner, weight = loop_of(12)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="14 weights were pruned, but 0 of 20 prunable weights"):
        pruner.finish()


def test_weights_are_attached_once_for_an_optimizer():
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights)
    for i, weight in enumerate(weights):
        attach(optimizer, {f"w{i}": weight}, method=GMP(), schedule=SCHEDULE)
        with pytest.raises(ValueError, match="pruned already under this optimizer"):
            attach(optimizer, {"again": weight}, method=GMP(), schedule=SCHEDULE)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"final_sparsity": 0.8}, "saved with final_sparsity 0.7 (here 0.8)"),
        ({"num_steps": 24}, "saved with num_steps 12 (here 24)"),
    ],
)
def test_a_state_of_another_schedule_is_refused(changes, problem):
    saved, weight = loop_of(4)
    other = attach(
        torch.optim.SGD([weight]),
        {"w": weight},
        method=GMP(),
        schedule=replace(SCHEDULE, **changes),
    )
    with pytest.raises(ValueError, match=re.escape(problem)):
        other.load_state_dict(saved.state_dict())


def pruner_of(weights, method):
    optimizer = torch.optim.SGD(list(weights.values()))
    return attach(optimizer, weights, method=method, schedule=SCHEDULE)


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "problem"),
    [
        (
            MGPP(num_examples=50),
            MGPP(num_examples=50, spike_var=1e-6),
            "saved with spike_var None (here 1e-06): resume with the settings",
        ),
        (
            MGPP(num_examples=50),
            MGPP(num_examples=60),
            "saved with num_examples 50 (here 60)",
        ),
        (
            MGPP(num_examples=50, decoupled=True, slab_prob=0.2),
            MGPP(num_examples=50),
            "saved with slab_prob 0.2 (here 0.1), decoupled True (here False)",
        ),
        (
            PLATON(beta1=0.85),
            PLATON(beta1=0.5),
            "saved with beta1 0.85 (here 0.5)",
        ),
    ],
)
def test_a_state_of_a_method_with_other_settings_is_refused(saved_by, resumed_by, problem):
    def weights():
        return {"w": nn.Parameter(torch.linspace(0.1, 1, 20).view(4, 5))}

    state = pruner_of(weights(), saved_by).state_dict()
    with pytest.raises(ValueError, match=re.escape(problem)):
        pruner_of(weights(), resumed_by).load_state_dict(state)
    again = pruner_of(weights(), replace(saved_by))
    again.load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "here", "problem"),
    [
        (
            {"a": (4, 5)},
            {"a": (4, 5), "b": (4, 5)},
            "does not hold 1 weight that is prunable here: b",
        ),
        ({"a": (4, 5), "b": (4, 5)}, {"a": (4, 5)}, "holds 1 weight that is not prunable here: b"),
        (
            dict.fromkeys("abcde", (4, 5)),
            {"a": (4, 5)},
            "holds 4 weights that are not prunable here: b, c, d, ...",
        ),
        ({"a": (4, 5)}, {"a": (5, 4)}, "holds a of shape (4, 5), here it is (5, 4)"),
    ],
)
def test_a_state_of_other_weights_is_refused(saved, here, problem):
    def pruner(shapes):
        weights = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
        return pruner_of(weights, GMP())

    with pytest.raises(ValueError, match=re.escape(f"the pruner's state {problem}")):
        pruner(here).load_state_dict(pruner(saved).state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_at_the_end_are_found_out(value):
    pruner, weight = loop_of(12)
    with torch.no_grad():
        weight[-1, -1] = value
    with pytest.raises(RuntimeError, match="1 of 20 prunable weights are not finite"):
        pruner.finish()


def test_what_is_no_state_of_a_pruner_is_refused():
    saved, _ = loop_of(4)
    state = saved.state_dict()
    with pytest.raises(ValueError, match="no state of a pruner"):
        saved.load_state_dict({})
    method = {**state, "settings": {**state["settings"], "method": "mgpp", "scope": "layer"}}
    with pytest.raises(ValueError, match=r"method 'mgpp' \(here 'gmp'\), scope 'layer'"):
        saved.load_state_dict(method)


@pytest.mark.parametrize("cut_into", [contiguous_shards, per_weight_shards])
@pytest.mark.parametrize("world_size", [2, 3])
def test_masks_figures_and_hash_do_not_depend_on_the_sharding(world_size, cut_into):
    def run(collectives, cut=cut_into):
        pruner = make_pruner(make_weights(), collectives, cut)
        for _ in range(10):
            pruner.finish_step()
        figures = pruner.last_pruning, pruner.sparsity_by_weight(), pruner.mask_hash()
        return *figures, pruner.spike_share(0.5), pruner.num_zeros()

    alone = run_ranks(1, lambda c: run(c, per_weight_shards))[0]
    assert all(result == alone for result in run_ranks(world_size, run))


@st.composite
def runs(draw):
    """Draw matrices, a schedule, a method and a number of ranks."""
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)
    )
    initial = draw(st.sampled_from([0.0, 0.25, 0.5]))
    schedule = PruningSchedule(
        num_steps=14,
        warmup_steps=draw(st.integers(0, 4)),
        finetune_steps=draw(st.integers(0, 5)),
        interval=draw(st.integers(1, 5)),
        initial_sparsity=initial,
        final_sparsity=draw(st.sampled_from([0.5, 0.73, 0.99])),
    )
    method = draw(st.sampled_from([GMP(), MGPP(num_examples=100)]))
    return shapes, schedule, method, draw(st.integers(2, 5)), draw(st.integers(0, 99))


@pytest.mark.slow
@settings(max_examples=40)
@given(run=runs(), cut_into=st.sampled_from([contiguous_shards, per_weight_shards]))
def test_the_result_does_not_depend_on_the_number_of_ranks(run, cut_into):
    shapes, schedule, method, world_size, seed = run

    def train(collectives):
        """Take steps of plain gradient descent; few values, so that many magnitudes are tied."""
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randint(-6, 7, shape, generator=generator) / 8 for shape in shapes]
        steps = [
            [torch.randint(-1, 2, shape, generator=generator) / 64 for shape in shapes]
            for _ in range(schedule.num_steps)
        ]
        shards = cut_into(weights, collectives.rank, collectives.world_size)
        names = {f"layers.{i}.weight": tuple(shape) for i, shape in enumerate(shapes)}
        pruner = Pruner(shards, names, method=method, schedule=schedule, collectives=collectives)
        hashes = []
        for step in steps:
            for shard in shards:
                gradient = step[shard.index].reshape(-1)
                whole = torch.zeros_like(shard.flat)
                flat = whole.view(-1)[shard.start : shard.start + shard.numel]
                flat.copy_(gradient[shard.offset : shard.offset + shard.numel])
                if shard.flat.grad is None or shard.start == 0:
                    shard.flat.grad = whole
                else:
                    shard.flat.grad += whole
            pruner.before_update(shards)
            for shard in shards:
                shard.weight.sub_(shard.grad)
            pruner.after_update(shards)
            pruner.finish_step()
            hashes.append(pruner.mask_hash())
        pieces = [(s.index, s.offset, s.weight.clone()) for s in shards if s.numel]
        return hashes, pruner.last_pruning, pieces

    (expected,) = run_ranks(1, train)
    found = run_ranks(world_size, train)
    for hashes, pruning, _ in found:
        assert (hashes, pruning) == expected[:2]
    pieces = sorted((i, offset, w) for _, _, ps in found for i, offset, w in ps)
    joined = torch.cat([w for _, _, w in pieces])
    assert torch.equal(joined, torch.cat([w for _, _, w in sorted(expected[2])]))


def test_ranks_that_come_to_other_masks_are_found_out():
    def work(collectives):
        weights = make_weights()
        if collectives.rank == 1:
            weights[1].view(-1)[4] = 0.0  # a replica that went its own way
        shards = per_weight_shards(weights, 0, 1)
        shapes = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
        replica = Pruner(shards, shapes, method=GMP(), schedule=SCHEDULE, replica_group=collectives)
        for _ in range(4):
            replica.finish_step()

    with pytest.raises(RuntimeError, match="the ranks disagree on the masks of step 2"):
        run_ranks(2, work)


def test_hash_tells_masks_apart():
    def hash_of(pruned):
        weights = make_weights()
        weights[2].view(-1)[pruned] = 0.0
        pruner = make_pruner(
            weights, collectives=run_ranks(1, lambda c: c)[0], cut_into=per_weight_shards
        )
        pruner._prune(1)
        return pruner.mask_hash()

    assert len({hash_of(i) for i in range(132)}) == 132


def run_to_step_7(collectives, cut_into):
    pruner = make_pruner(make_weights(), collectives, cut_into)
    for _ in range(7):
        pruner.finish_step()
    return pruner


def whole_masks(pruners):
    """Return the mask of each whole weight, joined from all ranks."""
    joined = {}
    for pruner in pruners:
        for shard in pruner.shards:
            whole = joined.setdefault(shard.name, torch.zeros(shard.full_numel, dtype=torch.bool))
            whole[shard.offset : shard.offset + shard.numel] = pruner.mask(shard)
    return joined


def same_masks(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cut_into", [contiguous_shards, per_weight_shards])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_state_is_taken_up_by_any_other_cut(world_size, cut_into):
    saved_by = run_ranks(2, lambda collectives: run_to_step_7(collectives, contiguous_shards))
    states = [pruner.state_dict() for pruner in saved_by]
    joined = {**states[0], "masks": [mask for state in states for mask in state["masks"]]}

    def work(collectives):
        fresh = make_pruner(make_weights(), collectives, cut_into)
        fresh.load_state_dict(joined)
        assert (fresh.step, fresh.last_pruning) == (7, saved_by[0].last_pruning)
        return fresh

    assert same_masks(whole_masks(run_ranks(world_size, work)), whole_masks(saved_by))


def test_a_state_is_taken_up_by_its_own_rank_and_refused_where_it_does_not_suffice():
    def work(collectives):
        pruner = run_to_step_7(collectives, contiguous_shards)
        fresh = make_pruner(make_weights(), collectives, contiguous_shards)
        fresh.load_state_dict(pruner.state_dict())
        other = make_pruner(make_weights(), collectives, per_weight_shards)
        with pytest.raises(ValueError, match="do not cover"):
            other.load_state_dict(pruner.state_dict())
        return pruner, fresh

    pruners, fresh = zip(*run_ranks(2, work), strict=True)
    assert same_masks(whole_masks(fresh), whole_masks(pruners))


def test_masks_of_another_step_are_not_taken_for_those_of_the_last_pruning():
    pruner = run_to_step_7(run_ranks(1, lambda c: c)[0], contiguous_shards)
    state = pruner.state_dict()
    state["masks"][0]["keep"] ^= 1
    with pytest.raises(RuntimeError, match="are they of the same step"):
        pruner.load_state_dict(state)


def test_shards_that_do_not_cover_the_weights_are_refused():
    weights = make_weights()
    shards = contiguous_shards(weights, 0, 2)
    shapes = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
    with pytest.raises(RuntimeError, match="of the 132 elements"):
        Pruner(shards, shapes, method=GMP(), schedule=SCHEDULE)


def test_low_precision_masters_are_refused():
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must be float32"):
        attach(torch.optim.SGD([weight]), {"w": weight}, method=GMP(), schedule=SCHEDULE)


def test_a_weight_without_gradient_is_named():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    attach(optimizer, {"w": weight}, method=MGPP(num_examples=5), schedule=SCHEDULE)
    with pytest.raises(RuntimeError, match="w: no gradient"):
        optimizer.step()


def test_displacement_is_that_of_sorting_on_any_ranks():
    """Weights are moved between prunings; what is recorded is held against numpy on whole weights."""
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn(60, 70, generator=generator),
        3 * torch.randn(40, 50, generator=generator),
    ]
    moves = [0.6 * torch.randn(w.shape, generator=generator) for w in weights]
    names = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
    schedule = PruningSchedule(
        num_steps=4,
        warmup_steps=0,
        finetune_steps=1,
        interval=1,
        initial_sparsity=0.5,
        final_sparsity=0.8,
    )

    def work(collectives, world_size, cut_into, scope):
        shards = cut_into(weights, collectives.rank, world_size)
        placed = cut_into(moves, collectives.rank, world_size)
        placement = Placement(scope=scope)
        pruner = Pruner(
            shards,
            names,
            method=GMP(),
            schedule=schedule,
            collectives=collectives,
            placement=placement,
        )
        first = pruner.finish_step()
        for shard, move in zip(shards, placed, strict=True):
            shard.weight.add_(move.weight)
        return first, pruner.finish_step(), [(s, pruner.mask(s)) for s in shards]

    for scope in ("global", "uniform"):
        first, second, masks = work(Collectives(), 1, contiguous_shards, scope)
        assert (first.revived, first.moved_median, first.moved_p99) == (0.0, None, None)
        cut_by = [torch.cat([w.flatten() for w in weights])] if scope == "global" else weights
        kept_first, moved, cuts = [], [], []
        for part in cut_by:
            k = int(part.numel() * 0.5)
            kept_first.append(part.abs().flatten() > part.abs().flatten().sort().values[k - 1])
        before = torch.cat(kept_first)
        now = torch.where(before, torch.cat([w.flatten() for w in weights]), 0.0)
        now += torch.cat([m.flatten() for m in moves])
        after = torch.cat([mask for _, mask in masks])
        sizes = [part.numel() for part in cut_by]
        for values, old, new in zip(
            now.split(sizes), before.split(sizes), after.split(sizes), strict=True
        ):
            cuts.append(values[~new].abs().max())
            moved.append(values[~old].abs() / cuts[-1])
        moved = torch.cat(moved)
        assert second.revived == pytest.approx(float((after & ~before).sum() / (~before).sum()))
        assert second.revived == pytest.approx(float((moved > 1).float().mean()))
        assert second.moved_median == pytest.approx(float(moved.quantile(0.5)), rel=0.01)
        assert second.moved_p99 == pytest.approx(float(moved.quantile(0.99)), rel=0.01)
        for world_size, cut_into in ((2, odd_shards), (4, per_weight_shards)):
            found = run_ranks(
                world_size,
                lambda c, n=world_size, cut=cut_into, scope=scope: work(c, n, cut, scope),
            )
            assert {result[1] for result in found} == {second}


def test_displacement_is_of_magnitudes_alone():
    """Not of what prunes by a score, nor where the cut is at zero."""
    counts = [0] * 2048
    counts[0] = 3
    assert displacement_quantile(counts, 0.5) == 0.0
    counts[12 * 128] = 7  # from 1 to 1 + 1/128
    assert displacement_quantile(counts, 0.3) == 0.0
    assert displacement_quantile(counts, 0.5) == pytest.approx(1.0, rel=0.01)
