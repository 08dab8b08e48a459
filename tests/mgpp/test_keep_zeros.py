"""Pruning a pruned model further: its zeros first and for ever, against sorting whole matrices."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mgpp
from mgpp.backends.torch import attach
from mgpp.methods import GMP, METHODS, Method
from tests.mgpp.placements import kept
from tests.mgpp.ranks import contiguous_shards, odd_shards, per_weight_shards, run_ranks

SHAPES = [(6, 8), (4, 12), (10, 4)]
NAMES = [f"layers.{i}.weight" for i in range(len(SHAPES))]
SCHEDULE = mgpp.PruningSchedule(
    num_steps=9,
    warmup_steps=1,
    finetune_steps=2,
    interval=2,
    initial_sparsity=0.1,
    final_sparsity=0.75,
)


class Drawn(Method):
    """Prunes by given scores, few of them distinct; those of the kept zeros are among the highest."""

    name = "drawn"
    title = "Drawn"

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def score(self, shard):
        whole = self.scores[shard.index].reshape(-1)
        return whole[shard.offset : shard.offset + shard.numel].clone()


def draw(seed, share, pattern=None):
    """Weights with zeros, how each step moves them, and scores."""
    generator = torch.Generator().manual_seed(seed)
    weights, moves, scores = [], [], []
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=generator)
        zero = torch.rand(rows, columns, generator=generator) < share
        if pattern == "2x1":
            zero = zero[::2].repeat_interleave(2, 0)
        if pattern == "1:4":  # three of four at most
            zero.view(-1, 4)[:, seed % 4] = False
        weight[zero] = 0.0
        weights.append(weight)
        moves.append(0.1 * torch.randn(SCHEDULE.num_steps, rows, columns, generator=generator))
        score = torch.randint(4, (rows, columns), generator=generator).float()
        scores.append(score.masked_fill(zero, 3.0))
    return weights, moves, scores


def run(shards, moves, method, placement, collectives):
    """Go through the schedule without an optimizer; the masks of each pruning, the weights at the end."""
    pruner = mgpp.Pruner(
        shards,
        dict(zip(NAMES, SHAPES, strict=True)),
        method=method,
        schedule=SCHEDULE,
        placement=placement,
        collectives=collectives,
        keep_zeros=True,
    )
    assert not pruner.misfit
    found = []
    for step in range(SCHEDULE.num_steps):
        for shard in shards:
            move = moves[shard.index][step].reshape(-1)
            shard.weight.add_(move[shard.offset : shard.offset + shard.numel])
        pruner.after_update(shards)
        if pruner.finish_step() is not None:
            masks = [(s.index, s.offset, pruner.mask(s).clone()) for s in shards]
            found.append((vars(pruner.last_pruning), masks))
    return found, [(s.index, s.offset, s.weight.clone()) for s in shards], pruner.finish()


def joined(parts, fill):
    """Put what the ranks hold of each matrix together."""
    whole = [torch.full((rows * columns,), fill) for rows, columns in SHAPES]
    for index, offset, values in parts:
        whole[index][offset : offset + len(values)] = values
    return [w.view(shape) for w, shape in zip(whole, SHAPES, strict=True)]


def dense(weights, moves, scores, placement):
    """The same on whole matrices: the masks of each pruning, the weights at the end."""
    weights = [w.clone() for w in weights]
    zeros = [w == 0 for w in weights]
    total = sum(zero.numel() for zero in zeros)
    least = (sum(int(zero.sum()) for zero in zeros) + 0.5) / total
    history, keep = [], None
    for step in range(SCHEDULE.num_steps):
        for weight, move, zero in zip(weights, moves, zeros, strict=True):
            weight.add_(move[step])
            weight[zero] = 0.0
        if step > SCHEDULE.prune_end:
            for weight, name in zip(weights, NAMES, strict=True):
                weight[~keep[name]] = 0.0
        if SCHEDULE.is_pruning_step(step):
            by = scores or [w.abs() for w in weights]
            by = [s.masked_fill(zero, -float("inf")) for s, zero in zip(by, zeros, strict=True)]
            share = max(SCHEDULE.sparsity(step), least)
            keep = kept(
                placement,
                dict(zip(NAMES, by, strict=True)),
                share,
                lambda final, step=step: SCHEDULE.sparsity(step, final),
            )
            for weight, name in zip(weights, NAMES, strict=True):
                weight[~keep[name]] = 0.0
            history.append(keep)
    return history, weights


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 999),
    share=st.sampled_from([0.1, 0.3, 0.6]),
    by_score=st.booleans(),
    pattern=st.sampled_from([None, "1:4", "2x1"]),
    min_kept=st.sampled_from([0.0, 0.05]),
    world_size=st.integers(1, 3),
    cut=st.sampled_from([contiguous_shards, per_weight_shards, odd_shards]),
)
def test_every_pruning_is_that_of_sorting_with_the_zeros_first(
    seed, share, by_score, pattern, min_kept, world_size, cut
):
    weights, moves, scores = draw(seed, share, pattern)
    placement = mgpp.Placement(pattern=pattern, min_kept=0.0 if pattern else min_kept)
    given_scores = scores if by_score else None
    history, final = dense(weights, moves, given_scores, placement)

    def work(collectives):
        shards = cut(weights, collectives.rank, collectives.world_size)
        method = Drawn(scores) if by_score else GMP()
        return run(shards, moves, method, placement, collectives)

    results = run_ranks(world_size, work)
    assert len(results[0][0]) == len(history)
    for number, keep in enumerate(history):
        found = joined([part for r in results for part in r[0][number][1]], fill=True)
        for name, mask in zip(NAMES, found, strict=True):
            assert torch.equal(mask, keep[name]), (number, name)
    for weight, expected in zip(
        joined([part for r in results for part in r[1]], fill=9.0), final, strict=True
    ):
        assert torch.equal(weight, expected)
    unit = 2 if pattern == "2x1" else 1
    k = int(sum(w.numel() for w in weights) * SCHEDULE.final_sparsity) // unit * unit
    assert results[0][0][-1][0]["num_pruned"] == k
    assert {r[2] for r in results} == {k / sum(w.numel() for w in weights)}


@pytest.mark.parametrize("scope", ["layer", "uniform", "lamp"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_in_other_scopes_the_zeros_are_among_what_each_takes(scope, world_size):
    weights, moves, _ = draw(3, 0.5)
    weights[2][:9] = 0.0  # more than its share at first, under each scope
    if scope != "lamp":
        weights[2][:9] = torch.randn(9, 4)
        weights[2][:7] = 0.0
    zeros = [w == 0 for w in weights]
    placement = mgpp.Placement(scope=scope)

    def work(collectives):
        shards = contiguous_shards(weights, collectives.rank, collectives.world_size)
        return run(shards, moves, GMP(), placement, collectives)

    results = run_ranks(world_size, work)
    total = sum(w.numel() for w in weights)
    for number in range(len(results[0][0])):
        masks = joined([part for r in results for part in r[0][number][1]], fill=True)
        for mask, zero in zip(masks, zeros, strict=True):
            assert not (mask & zero).any()
        pruned = sum(int((~mask).sum()) for mask in masks)
        assert pruned == results[0][0][number][0]["num_pruned"]
    assert pruned == int(0.75 * total)
    if scope == "uniform":
        assert [int((~mask).sum()) for mask in masks] == [36, 36, 30]


def test_lamp_does_not_share_the_zeros_of_one_matrix_with_another_s_tiny_weights():
    """Its lowest bin has both; what is pruned first is as many weights as there are zeros."""
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]
    weights[0].view(-1)[:30] = 0.0
    weights[1].view(-1)[:20] = 1e-15
    moves = [torch.zeros(SCHEDULE.num_steps, *shape) for shape in SHAPES]
    shards = contiguous_shards(weights, 0, 1)
    found, _, _ = run(shards, moves, GMP(), mgpp.Placement(scope="lamp"), mgpp.Collectives())
    first, masks = found[0]
    assert first["num_pruned"] == 30
    assert [int((~mask).sum()) for _, _, mask in masks] == [30, 0, 0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])
        self.head = nn.Linear(9, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def make_net(share=0.6):
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for layer in net.layers:
            layer.weight[torch.rand(9, 9) < share] = 0.0
            layer.weight[0, 0] = -0.0
    return net


CONFIG = {"sparsity": 0.85, "initial_sparsity": 0.3, "interval": 3, "keep_zeros": True}


def train(net, optimizer, pruner, begin, end):
    for seed in range(begin, end):
        generator = torch.Generator().manual_seed(seed)
        net(torch.randn(4, 9, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield pruner


@pytest.mark.parametrize("name", [n for n in METHODS if not METHODS[n].keeps_zeros])
def test_by_every_method_the_zeros_stay_after_each_step_and_a_resumed_run_ends_alike(name):
    config = {**CONFIG, "method": name}

    def begin(state=None):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        if state is not None:
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
        pruner = mgpp.attach((net, optimizer), config, 20, 80)
        if state is not None:
            pruner.load_state_dict(state["pruner"])
        return net, optimizer, pruner

    net, optimizer, pruner = begin()
    zeros = [layer.weight.detach() == 0 for layer in net.layers]
    num_zeros = sum(int(zero.sum()) for zero in zeros)
    assert (pruner.last_pruning.step, pruner.last_pruning.num_pruned) == (-1, num_zeros)
    states = {}
    for _ in train(net, optimizer, pruner, 0, 20):
        for layer, zero in zip(net.layers, zeros, strict=True):
            held = layer.weight.detach()[zero]
            assert (held.view(torch.int32) == 0).all()  # to the bit: no -0.0
        assert pruner.last_pruning.num_pruned >= num_zeros
        if pruner.step in (1, 7, 19):
            states[pruner.step] = copy.deepcopy(
                {
                    "net": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "pruner": pruner.state_dict(),
                }
            )
    assert pruner.num_zeros() == int(0.85 * 243)
    assert pruner.finish() == int(0.85 * 243) / 243
    for step, state in states.items():
        again, other, resumed = begin(state)
        for _ in train(again, other, resumed, step, 20):
            pass
        assert resumed.mask_hash() == pruner.mask_hash()
        for a, b in zip(net.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), step


def test_the_zeros_of_a_resumed_run_are_those_it_began_with():
    """Not those of the weights that are loaded, of which more happen to be zero, too many even."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = mgpp.attach((net, optimizer), CONFIG, 20, 80)
    list(train(net, optimizer, pruner, 0, 5))
    state = copy.deepcopy(pruner.state_dict())
    with torch.no_grad():
        for layer in net.layers:
            layer.weight[1:] = 0.0
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    resumed = mgpp.attach((net, other), CONFIG, 20, 80)
    assert "keep_zeros: " in resumed.misfit
    resumed.load_state_dict(state)
    for saved, found in zip(state["masks"], resumed.state_dict()["masks"], strict=True):
        assert torch.equal(saved["zeros"], found["zeros"])
    list(train(net, other, resumed, 5, 20))
    assert resumed.num_zeros() == int(0.85 * 243)


def test_its_state_is_not_that_of_a_run_that_keeps_none():
    states = {}
    for keeps in (False, True):
        net = make_net()
        pair = (net, torch.optim.SGD(net.parameters(), lr=0.1))
        pruner = mgpp.attach(pair, {**CONFIG, "keep_zeros": keeps}, 20, 80)
        states[keeps] = pruner.state_dict()
        if keeps:
            with pytest.raises(ValueError, match=r"keep_zeros False \(here True\)"):
                pruner.load_state_dict(states[False])
        else:
            old = {k: v for k, v in states[False]["settings"].items() if k != "keep_zeros"}
            pruner.load_state_dict({**states[False], "settings": old})  # of before it was a setting
            assert "zeros" not in states[False]["masks"][0]


def misfit(weights, schedule=SCHEDULE, **placement):
    shapes = dict(zip(NAMES, SHAPES, strict=True))
    pruners = run_ranks(
        2,
        lambda c: mgpp.Pruner(
            contiguous_shards(weights, c.rank, 2),
            shapes,
            method=GMP(),
            schedule=schedule,
            placement=mgpp.Placement(**placement),
            collectives=c,
            keep_zeros=True,
        ),
    )
    assert pruners[0].misfit == pruners[1].misfit
    with pytest.raises(ValueError, match="keep_zeros: ") as raised:
        pruners[0].before_update(pruners[0].shards)
    assert str(raised.value) == pruners[0].misfit
    return pruners[0].misfit


def test_more_zeros_than_are_to_be_are_refused_with_both_numbers():
    weights = [torch.zeros(shape) for shape in SHAPES]
    weights[0][0] = 1.0
    assert misfit(weights) == (
        "keep_zeros: 128 of the 136 weights of the model that are prunable are zero at the start, and "
        "102 are to be zero in the end; raise sparsity"
    )


@pytest.mark.parametrize("scope", ["layer", "uniform"])
def test_more_zeros_than_a_layer_s_share_are_refused(scope):
    weights = [torch.ones(shape) for shape in SHAPES]
    weights[1].zero_()
    assert misfit(weights, scope=scope) == (
        "keep_zeros: 48 of the 48 weights of layers.1.weight are zero at the start, and 36 are to be "
        "zero in the end; raise sparsity, or let all weights compete (scope: global, no budgets)"
    )


def test_more_zeros_than_min_kept_leaves_are_refused():
    weights = [torch.ones(shape) for shape in SHAPES]
    weights[1].zero_()
    assert "48 of the 48 weights of layers.1.weight are zero at the start, and min_kept 0.1" in (
        misfit(weights, min_kept=0.1)
    )


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("1:4", "do not fit pattern '1:4': 2 zeros are too many for their groups of 4"),
        ("2x1", "do not fit pattern '2x1': 8 blocks are zero in part"),
    ],
)
def test_zeros_that_do_not_fit_a_pattern_are_refused(pattern, why):
    weights = [torch.ones(shape) for shape in SHAPES]
    weights[0][1] = 0.0
    assert why in misfit(weights, pattern=pattern)


def test_a_model_without_zeros_is_refused():
    net = make_net(share=0.0)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.fill_(1.0)
    pair = (net, torch.optim.SGD(net.parameters()))
    with pytest.raises(
        ValueError, match=r"keep_zeros: 0 of the 243 .* starts from a model that was"
    ):
        mgpp.attach(pair, CONFIG, 20, 80)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"method": "sparse-transfer"},
            "keep_zeros: means nothing for sparse-transfer, which keeps",
        ),
        (
            {"method": "wanda", "sparsity": 0.5},
            "keep_zeros: means nothing for wanda, which prunes once",
        ),
        ({"sparsity": 0.5, "keep_zeros": 1}, "keep_zeros must be true or false, got 1"),
    ],
)
def test_where_it_means_nothing_it_is_refused(config, why):
    with pytest.raises(ValueError, match=why):
        mgpp.PruningConfig(**{"keep_zeros": True, **config})


def test_how_far_pruned_weights_moved_leaves_out_what_was_held():
    """A kept zero does not move; the others do, by what the reference counts."""
    weight = nn.Parameter(torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]))
    schedule = mgpp.PruningSchedule(
        num_steps=4,
        warmup_steps=0,
        finetune_steps=1,
        interval=1,
        final_sparsity=0.75,
        initial_sparsity=0.5,
    )
    optimizer = torch.optim.SGD([weight], lr=1.0)
    pruner = attach(optimizer, {"w": weight}, method=GMP(), schedule=schedule, keep_zeros=True)
    moved = torch.tensor([[9.0, 9.0, 0.5, 0.75, 0.0, 0.0, 0.0, 0.0]])
    for _ in range(2):
        weight.grad = -moved
        optimizer.step()
    # What pruned weights moved at the second pruning: 0.5 and 0.75, of a cut at the 5th lowest, 3.0.
    assert pruner.last_pruning.num_pruned == 5
    assert pruner.last_pruning.moved_median == pytest.approx(0.5 / 3, rel=0.01)
