"""What goes under every placement, on any number of ranks, against brute force on whole matrices."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mgpp import (
    GMP,
    Allocation,
    Collectives,
    Movement,
    Placement,
    Pruner,
    PruningSchedule,
    Shard,
    SoftMovement,
)
from mgpp.masking.threshold import Group, find_cuts, packed_masks, sent_bytes
from mgpp.sharding.bitmask import unpack_bits
from tests.mgpp.placements import block_means, kept, lowest, n_of_m_allowed, only_lowest
from tests.mgpp.ranks import (
    contiguous_shards,
    odd_shards,
    per_weight_shards,
    run_ranks,
    stacks_of,
)

LAYOUTS = [contiguous_shards, per_weight_shards, odd_shards]


def schedule_to(sparsity, initial=0.0):
    return PruningSchedule(
        num_steps=3,
        warmup_steps=0,
        finetune_steps=1,
        interval=1,
        initial_sparsity=initial,
        final_sparsity=sparsity,
    )


def prune(weights, world_size, cut_into, *, sparsity, transposed=(), method=GMP, **placement):
    """Prune twice on some ranks; return the last pruning and the whole masks, True = stays."""
    names = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}

    def work(collectives):
        shards = cut_into(weights, collectives.rank, world_size)
        pruner = Pruner(
            shards,
            names,
            method=method(),
            schedule=schedule_to(sparsity),
            collectives=collectives,
            placement=Placement(**placement),
            transposed=transposed,
        )
        pruner.finish_step()
        pruner.finish_step()
        for shard in shards:
            assert torch.equal(shard.weight != 0, pruner.mask(shard) & (shard.weight != 0))
        return pruner

    pruners = run_ranks(world_size, work)
    assert len({str(pruner.last_pruning) for pruner in pruners}) == 1
    masks = [torch.ones(w.numel(), dtype=torch.bool) for w in weights]
    for pruner in pruners:
        for shard in pruner.shards:
            masks[shard.index][shard.offset : shard.offset + shard.numel] = pruner.mask(shard)
    return pruners[0].last_pruning, [m.view_as(w) for m, w in zip(masks, weights, strict=True)]


def make_weights(shapes, seed, tied):
    generator = torch.Generator().manual_seed(seed)
    if tied:
        return [torch.randint(-3, 4, shape, generator=generator) / 8 for shape in shapes]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    # Layers of other sizes, so that bounds are reached.
    return [w * 4.0 ** -(i % 3) for i, w in enumerate(weights)]


@st.composite
def cases(draw, multiple=(1, 1)):
    rows, columns = multiple
    shapes = draw(
        st.lists(
            st.tuples(st.integers(1, 8), st.integers(1, 6)).map(
                lambda s: (s[0] * rows, s[1] * columns)
            ),
            min_size=1,
            max_size=4,
        )
    )
    weights = make_weights(shapes, draw(st.integers(0, 99)), draw(st.booleans()))
    return weights, draw(st.integers(1, 5)), draw(st.sampled_from(LAYOUTS))


SHARES = st.sampled_from([0.1, 0.3, 0.5, 0.55, 0.73, 0.9])


@settings(max_examples=60)
@given(case=cases(), sparsity=SHARES, min_kept=st.sampled_from([0.0, 0.05, 0.2, 0.5]))
def test_global_with_a_share_kept(case, sparsity, min_kept):
    weights, world_size, cut_into = case
    caps = [min(w.numel(), int((1 - min_kept) * w.numel() + 1e-9)) for w in weights]
    k = int(sum(w.numel() for w in weights) * sparsity)
    if 1 - min_kept < sparsity or k > sum(caps):
        with pytest.raises(ValueError, match="min_kept"):
            prune(weights, 1, cut_into, sparsity=sparsity, min_kept=min_kept)
        return
    pruning, masks = prune(weights, world_size, cut_into, sparsity=sparsity, min_kept=min_kept)
    scores = [w.abs() for w in weights]
    allowed = [only_lowest(s, cap) for s, cap in zip(scores, caps, strict=True)]
    expected = lowest(scores, k, allowed)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert pruning.num_pruned == k
    gone = torch.cat([s[~m] for s, m in zip(scores, masks, strict=True)])
    assert pruning.threshold == (gone.max() if k else 0.0)


@settings(max_examples=40)
@given(case=cases(), sparsity=SHARES)
def test_uniform(case, sparsity):
    weights, world_size, cut_into = case
    pruning, masks = prune(weights, world_size, cut_into, sparsity=sparsity, scope="uniform")
    total = sum(w.numel() for w in weights)
    k = int(total * sparsity)
    going = [int((~m).sum()) for m in masks]
    assert sum(going) == k == pruning.num_pruned
    for weight, mask, count in zip(weights, masks, going, strict=True):
        assert abs(count - weight.numel() * k / total) < 1
        assert torch.equal(mask, lowest([weight.abs()], count)[0])


@settings(max_examples=20)
@example(case=([torch.arange(37.0).view(1, 37)], 1, contiguous_shards), sparsity=0.3)  # 29 in all
@given(case=cases(), sparsity=SHARES)
def test_budgets_with_the_rest_together(case, sparsity):
    weights, world_size, cut_into = case
    weights = [*weights, torch.linspace(-1, 1, 60).view(6, 10)]
    budgets = {f"layers.{len(weights) - 1}.*": 0.5}
    total = sum(w.numel() for w in weights)
    going = int(total * sparsity)
    budget = 29 if going == 29 else 30  # a budget gives way by what rounding may have cost, no more
    rest = going - budget
    if not 0 <= rest <= total - 60:
        with pytest.raises(ValueError, match="budgets"):
            prune(weights, 1, cut_into, sparsity=sparsity, budgets=budgets)
        return
    pruning, masks = prune(weights, world_size, cut_into, sparsity=sparsity, budgets=budgets)
    expected = lowest([w.abs() for w in weights[:-1]], rest)
    expected += lowest([weights[-1].abs()], budget)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert pruning.num_pruned == going


@settings(max_examples=60)
@given(
    n_of_m=st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (2, 5)]),
    data=st.data(),
    transposed=st.booleans(),
    part=st.sampled_from([0.4, 0.9, 1.0]),
)
def test_n_of_m(n_of_m, data, transposed, part):
    n, m = n_of_m
    weights, world_size, cut_into = data.draw(cases((1, m)))
    stored = [w.t().contiguous() for w in weights] if transposed else weights
    names = {f"layers.{i}.weight" for i in range(len(weights))} if transposed else ()
    sparsity = part * (1 - n / m)
    pruning, masks = prune(
        stored, world_size, cut_into, sparsity=sparsity, pattern=f"{n}:{m}", transposed=names
    )
    allowed = [n_of_m_allowed(w.abs(), n, m) for w in weights]
    if transposed:
        allowed = [a.t() for a in allowed]
    total = sum(w.numel() for w in weights)
    k = total * (m - n) // m if part == 1.0 else int(total * sparsity)
    expected = lowest([w.abs() for w in stored], k, allowed)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert pruning.num_pruned == k
    if part == 1.0:
        groups = torch.cat([(s.t() if transposed else s).reshape(-1, m) for s in masks])
        assert bool((groups.sum(dim=1) == n).all())


@settings(max_examples=60)
@given(
    block=st.sampled_from([(4, 1), (1, 4), (2, 3), (3, 2), (1, 1)]),
    data=st.data(),
    transposed=st.booleans(),
    sparsity=SHARES,
    scope=st.sampled_from(["global", "uniform"]),
)
def test_blocks(block, data, transposed, sparsity, scope):
    rows, columns = block
    weights, world_size, cut_into = data.draw(cases(block))
    stored = [w.t().contiguous() for w in weights] if transposed else weights
    names = {f"layers.{i}.weight" for i in range(len(weights))} if transposed else ()
    pruning, masks = prune(
        stored,
        world_size,
        cut_into,
        sparsity=sparsity,
        pattern=f"{rows}x{columns}",
        scope=scope,
        transposed=names,
    )
    total = sum(w.numel() for w in weights)
    k = int(total * sparsity) // (rows * columns)
    assert pruning.num_pruned == k * rows * columns
    means = [block_means(w.abs(), rows, columns) for w in weights]
    if transposed:  # blocks count as they are stored
        means = [b.t() for b in means]
    stay = []
    for weight, mask in zip(weights, masks, strict=True):
        turned = mask.t() if transposed else mask
        blocks = turned.reshape(
            weight.shape[0] // rows, rows, weight.shape[1] // columns, columns
        ).transpose(1, 2)
        share = blocks.double().mean(dim=(2, 3))
        assert bool(((share == 0) | (share == 1)).all())
        stay.append((share == 1).t() if transposed else share == 1)
    if scope == "global":
        expected = lowest(means, k)
    else:
        expected = [lowest([b], int((~s).sum()))[0] for b, s in zip(means, stay, strict=True)]
        for s in stay:
            assert abs(int((~s).sum()) - s.numel() * rows * columns * k / total) < 1
    assert all(torch.equal(a, b) for a, b in zip(stay, expected, strict=True))
    assert pruning.sparsity == pruning.num_pruned / total


@pytest.mark.slow
@settings(max_examples=120)
@given(
    data=st.data(),
    scope=st.sampled_from(["global", "layer", "uniform"]),
    pattern=st.sampled_from([None, "2:4", "1:4", "2x4", "4x1"]),
    min_kept=st.sampled_from([0.0, 0.1, 0.3]),
    budget=st.sampled_from([None, 0.0, 0.4, 0.7]),
    sparsity=st.sampled_from([0.2, 0.45, 0.6]),
)
def test_all_settings_together(data, scope, pattern, min_kept, budget, sparsity):
    weights, world_size, cut_into = data.draw(cases((4, 4)))
    budgets = {} if budget is None else {"layers.0.*": budget}
    placement = Placement(scope=scope, pattern=pattern, min_kept=min_kept, budgets=budgets)
    shapes = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
    try:
        Allocation(placement, shapes, schedule_to(sparsity))
    except ValueError:
        return
    pruning, masks = prune(weights, world_size, cut_into, sparsity=sparsity, **vars(placement))
    scores = dict(zip(shapes, (w.abs() for w in weights), strict=True))
    expected = kept(placement, scores, sparsity, lambda final: final)
    for name, mask in zip(shapes, masks, strict=True):
        assert torch.equal(mask, expected[name]), name
    assert pruning.num_pruned == sum(int((~mask).sum()) for mask in masks)


def test_sums_over_blocks_do_not_depend_on_who_holds_what():
    """Scores of very different sizes, whose float sums would depend on their order."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(48, 20, generator=generator)
        * 10.0 ** torch.randint(-9, 9, (48, 20), generator=generator)
        for _ in range(3)
    ]
    alone = prune(weights, 1, per_weight_shards, sparsity=0.5, pattern="16x4")
    for world_size in (2, 3, 5):
        for cut_into in LAYOUTS:
            found = prune(weights, world_size, cut_into, sparsity=0.5, pattern="16x4")
            assert found[0] == alone[0]
            assert all(torch.equal(a, b) for a, b in zip(found[1], alone[1], strict=True))


def test_scores_that_are_not_finite_make_no_blocks():
    weight = torch.ones(4, 4)
    weight[2, 1] = float("nan")
    with pytest.raises(RuntimeError, match="scores are not finite"):
        prune([weight], 2, per_weight_shards, sparsity=0.5, pattern="2x2")


class Given(Movement):
    """Movement pruning whose sums are what the weights were, signs included."""

    def score(self, shard):
        self.state(shard)["score"].copy_(shard.weight)
        return super().score(shard)

    def addable_score(self, shard):
        self.state(shard)["score"].copy_(shard.weight)
        return self.state(shard)["score"]


@pytest.mark.parametrize("cut_into", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scores_below_zero(world_size, cut_into):
    weights = make_weights([(8, 12), (12, 8)], 3, tied=False)
    pruning, masks = prune(weights, world_size, cut_into, sparsity=0.5, pattern="4x2", method=Given)
    means = [block_means(w, 4, 2) for w in weights]
    stay = lowest(means, 12)
    for mask, expected in zip(masks, stay, strict=True):
        assert torch.equal(mask, expected.repeat_interleave(4, 0).repeat_interleave(2, 1))
    gone = torch.cat([m[~s] for m, s in zip(means, stay, strict=True)])
    assert pruning.threshold == pytest.approx(float(gone.max()), rel=1e-6)
    _, masks = prune(weights, world_size, cut_into, sparsity=0.5, pattern="2:4", method=Given)
    expected = lowest(weights, 96, [n_of_m_allowed(w, 2, 4) for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


@pytest.mark.parametrize("case", ["smooth", "mostly zeros"])
def test_many_weights_cut_apart(case):
    """So many that the samples take few of them, by hand-made cuts that differ in every way."""
    generator = torch.Generator().manual_seed(5)
    sizes = [900_000, 400_000, 7, 650_001, 0x1234]
    weights = [torch.randn(size, generator=generator).view(1, -1) for size in sizes]
    for weight in weights:
        if case == "mostly zeros":
            weight[torch.rand(weight.shape, generator=generator) < 0.9] = 0.0
    numels = [w.numel() for w in weights]
    groups = [
        Group(indices=(0,), k=450_000),
        Group(indices=(1, 4), k=390_000),
        Group(indices=(2,), k=0),
        Group(indices=(3,), k=600_000),
    ]
    sent = []

    def work(collectives):
        def all_reduce(tensor):
            sent.append(tensor.numel() * 8)
            collectives.all_reduce(tensor)

        counted = Collectives(collectives.rank, collectives.world_size, all_reduce)
        shards: list[Shard] = contiguous_shards(weights, counted.rank, counted.world_size)
        stacks = stacks_of(shards, len(weights))
        cuts = find_cuts(stacks, groups, numels, counted)
        of_matrix = {i: cut for g, cut in zip(groups, cuts, strict=True) for i in g.indices}
        masks = packed_masks(stacks, of_matrix)
        return [
            (s.index, s.offset, unpack_bits(mask, s.numel))
            for s, mask in zip(shards, masks, strict=True)
        ]

    pieces = sorted((p for ps in run_ranks(2, work) for p in ps), key=lambda p: p[:2])
    for group in groups:
        found = torch.cat([keep for index, _, keep in pieces if index in group.indices])
        expected = lowest([weights[i].abs() for i in group.indices], group.k)
        assert torch.equal(found, torch.cat([e.view(-1) for e in expected]))
    assert sum(sent) / 2 <= sent_bytes(2, len(weights), num_groups=3)


def test_a_state_is_taken_up_by_any_other_cut():
    weights = make_weights([(8, 12), (12, 8), (4, 24)], 1, tied=True)
    names = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
    placement = Placement(scope="layer", min_kept=0.2, pattern="4x2")

    def pruner_of(collectives, cut_into):
        shards = cut_into(weights, collectives.rank, collectives.world_size)
        return Pruner(
            shards,
            names,
            method=Movement(),
            schedule=schedule_to(0.6, 0.2),
            collectives=collectives,
            placement=placement,
        )

    def first(collectives):
        pruner = pruner_of(collectives, odd_shards)
        pruner.finish_step()
        state = pruner.state_dict()
        pruner.finish_step()
        return state, pruner.last_pruning

    states, prunings = zip(*run_ranks(3, first), strict=True)
    joined = {**states[0], "masks": [mask for state in states for mask in state["masks"]]}

    def second(collectives):
        pruner = pruner_of(collectives, per_weight_shards)
        pruner.load_state_dict(joined)
        for shard in pruner.shards:
            shard.weight[~pruner.mask(shard)] = 0.0
        pruner.finish_step()
        return pruner.last_pruning

    assert set(map(str, run_ranks(2, second))) == set(map(str, prunings))


PLACEMENTS_OF_STACKS = [
    {},
    {"scope": "uniform"},
    {"scope": "lamp"},
    {"min_kept": 0.3},
    {"min_kept": 0.3, "scope": "uniform"},
    {"pattern": "1:4"},
    {"pattern": "1:4", "scope": "uniform"},
    {"pattern": "4x2"},
    {"pattern": "4x2", "scope": "uniform", "min_kept": 0.2},
]


@pytest.mark.slow
@settings(max_examples=60)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3
    ),
    placement=st.sampled_from(PLACEMENTS_OF_STACKS),
    transposed=st.booleans(),
    world_size=st.integers(1, 4),
    cut_into=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_a_stack_is_pruned_as_its_matrices_are(
    shapes, placement, transposed, world_size, cut_into, seed
):
    shapes = [(e, 4 * r, 4 * c) for e, r, c in shapes]
    try:
        whole = {str(i): shape for i, shape in enumerate(shapes)}
        Allocation(Placement(**placement), whole, schedule_to(0.6))
    except ValueError:
        return
    stacks = make_weights(shapes, seed, tied=seed % 3 == 0)
    stacks = [s * torch.arange(1.0, len(s) + 1).view(-1, 1, 1) for s in stacks]
    matrices = [matrix.clone() for stack in stacks for matrix in stack]

    def pruned(weights):
        names = {f"layers.{i}.weight" for i in range(len(weights))} if transposed else ()
        return prune(weights, world_size, cut_into, sparsity=0.6, transposed=names, **placement)

    of_stacks, stack_masks = pruned(stacks)
    of_matrices, matrix_masks = pruned(matrices)
    assert of_stacks == of_matrices
    found = [matrix for mask in stack_masks for matrix in mask]
    assert all(torch.equal(a, b) for a, b in zip(found, matrix_masks, strict=True))


def test_soft_movement_penalises_each_matrix_of_a_stack_alike():
    def of(weights):
        method = SoftMovement(num_examples=1)
        names = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
        shards = contiguous_shards(weights, 0, 1)
        flat = shards[0].flat
        flat.grad = torch.zeros_like(flat)
        group = {"lr": 0.1}
        pruner = Pruner(shards, names, method=method, schedule=schedule_to(0.5), group=group)
        pruner.finish_step()
        pruner.before_update(shards)
        return torch.cat([method.state(shard)["score_exp_avg"] for shard in shards])

    stack = torch.randn(3, 4, 4)
    other = torch.randn(2, 4)
    assert torch.equal(of([stack, other]), of([*stack, other]))
    assert of([stack, other]).abs().min() > 0
