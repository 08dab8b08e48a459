"""LAMP against its definition: scores of whole matrices in float64, sorted."""

import pytest
import torch

from mgpp import GMP, METHODS, Collectives, Placement, Pruner, PruningSchedule, make_method
from mgpp.masking.lamp import lamp_groups, sent_bytes
from mgpp.masking.threshold import Group
from tests.mgpp.ranks import (
    contiguous_shards,
    odd_shards,
    per_weight_shards,
    run_ranks,
    stacks_of,
)

SHAPES = [(96, 200), (384, 384), (40, 30), (500, 128)]


def make_weights(kind):
    """Matrices of other scales, as they are in pretrained models and as training leaves them."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    weights = [w * 10.0**-i for i, w in enumerate(weights)]
    if kind == "outliers":  # a few weights hundreds of times as large
        for weight in weights[1:3]:
            weight.view(-1)[::977] *= 300.0
    if kind == "heavy tails":
        weights = [w * torch.rand(w.shape, generator=generator) ** -1.2 for w in weights]
    if kind == "pruned before":  # most were set to zero and moved by a few steps since
        for weight in weights:
            small = weight.abs() < 1.2 * weight.std()
            steps = torch.randn(weight.shape, generator=generator) * 5e-5
            weight[small] = steps[small]
    return weights


def lamp_scores(weight):
    """Return the definition: w^2 over the sum of squares of all that are not smaller."""
    square = weight.double().flatten().square()
    values, order = square.sort()
    scores = torch.empty_like(square)
    scores[order] = values / values.flip(0).cumsum(0).flip(0)
    return scores


def counts_by_sorting(weights, k):
    scores = torch.cat([lamp_scores(w) for w in weights])
    owner = torch.cat([torch.full((w.numel(),), i) for i, w in enumerate(weights)])
    lowest = scores.sort(stable=True).indices[:k]
    return torch.bincount(owner[lowest], minlength=len(weights)).tolist()


def pruner_of(weights, collectives, cut_into, world_size, sparsity, method=None, **placement):
    names = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
    schedule = PruningSchedule(
        num_steps=3,
        warmup_steps=0,
        finetune_steps=1,
        interval=1,
        initial_sparsity=sparsity,
        final_sparsity=sparsity,
    )
    return Pruner(
        cut_into(weights, collectives.rank, world_size),
        names,
        method=method or GMP(),
        schedule=schedule,
        collectives=collectives,
        placement=Placement(scope="lamp", **placement),
    )


def masks_of(weights, world_size, cut_into, sparsity, **placement):
    def work(collectives):
        pruner = pruner_of(weights, collectives, cut_into, world_size, sparsity, **placement)
        pruner.finish_step()
        return pruner

    pruners = run_ranks(world_size, work)
    masks = [torch.ones(w.numel(), dtype=torch.bool) for w in weights]
    for pruner in pruners:
        for shard in pruner.shards:
            masks[shard.index][shard.offset : shard.offset + shard.numel] = pruner.mask(shard)
    return masks


@pytest.mark.parametrize("kind", ["plain", "outliers", "heavy tails", "pruned before"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_counts_are_those_of_sorting_to_a_tenth_of_a_point(kind, sparsity):
    weights = make_weights(kind)
    k = int(sum(w.numel() for w in weights) * sparsity)
    masks = masks_of(weights, 1, contiguous_shards, sparsity)
    found = [int((~mask).sum()) for mask in masks]
    assert sum(found) == k
    for count, expected, weight in zip(found, counts_by_sorting(weights, k), weights, strict=True):
        assert abs(count - expected) <= max(0.001 * weight.numel(), 2)


@pytest.mark.parametrize("kind", ["plain", "outliers", "pruned before"])
def test_masks_are_the_smallest_of_each_matrix_and_the_same_on_any_ranks(kind):
    weights = make_weights(kind)
    whole = masks_of(weights, 1, contiguous_shards, 0.9)
    for weight, mask in zip(weights, whole, strict=True):
        num_pruned = int((~mask).sum())
        lowest = weight.flatten().abs().sort(stable=True).indices[:num_pruned]
        assert not mask[lowest].any()
    for world_size, cut_into in (
        (2, contiguous_shards),
        (2, odd_shards),
        (4, per_weight_shards),
        (4, contiguous_shards),
    ):
        masks = masks_of(weights, world_size, cut_into, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(masks, whole, strict=True))


def test_the_scale_of_a_matrix_does_not_count():
    """Powers of two, so that scaling is exact."""
    weights = make_weights("plain")
    scaled = [w * 2.0 ** (9 * i - 12) for i, w in enumerate(weights)]
    for a, b in zip(
        masks_of(weights, 1, contiguous_shards, 0.9),
        masks_of(scaled, 1, contiguous_shards, 0.9),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_caps_hold_and_what_they_leave_goes_elsewhere():
    weights = make_weights("outliers")
    total = sum(w.numel() for w in weights)
    masks = masks_of(weights, 1, contiguous_shards, 0.95, min_kept=0.04)
    pruned = [int((~mask).sum()) for mask in masks]
    assert sum(pruned) == int(0.95 * total)
    free = [int((~mask).sum()) for mask in masks_of(weights, 1, contiguous_shards, 0.95)]
    most = [w.numel() - -(-w.numel() * 4 // 100) for w in weights]
    assert any(count > cap for count, cap in zip(free, most, strict=True))
    for count, cap, unbounded in zip(pruned, most, free, strict=True):
        assert count == cap if unbounded >= cap else unbounded <= count <= cap


def test_lamp_holds_within_a_budget():
    weights = make_weights("plain")
    masks = masks_of(weights, 1, contiguous_shards, 0.75, budgets={"layers.[01].*": 0.7})
    first, rest = weights[:2], weights[2:]
    k = int(0.7 * sum(w.numel() for w in first))
    due = int(0.75 * sum(w.numel() for w in weights)) - k
    expected = counts_by_sorting(first, k) + counts_by_sorting(rest, due)
    for mask, count in zip(masks, expected, strict=True):
        assert abs(int((~mask).sum()) - count) <= max(0.001 * mask.numel(), 2)


def test_zeros_go_first_also_where_there_are_too_many():
    """A matrix of zeros, and one whose values are all the same."""
    weights = [torch.zeros(60, 10), torch.full((40, 10), 0.5), torch.randn(30, 10)]
    for sparsity, most in ((0.3, 600), (0.5, 600), (0.9, 600)):
        masks = masks_of(weights, 1, contiguous_shards, sparsity)
        pruned = [int((~mask).sum()) for mask in masks]
        assert sum(pruned) == int(1300 * sparsity)
        assert pruned[0] == min(most, sum(pruned))


def test_what_is_sent_is_what_is_said():
    weights = make_weights("plain")
    sent = []

    def work(collectives):
        def all_reduce(tensor):
            sent.append(tensor.numel() * tensor.element_size())
            collectives.all_reduce(tensor)

        counted = Collectives(collectives.rank, collectives.world_size, all_reduce)
        shards = contiguous_shards(weights, collectives.rank, 2)
        group = Group(indices=(0, 1, 2, 3), k=1000)
        stacks = stacks_of(shards, len(weights))
        return lamp_groups(stacks, [group], [w.numel() for w in weights], counted)

    found = run_ranks(2, work)
    assert found[0] == found[1]
    assert sum(sent) == 2 * sent_bytes(2, len(weights))


@pytest.mark.parametrize("name", ["platon", "movement", "mgpp-saliency"])
def test_methods_with_a_score_of_their_own_are_refused(name):
    method = make_method(name, num_examples=10)
    with pytest.raises(ValueError, match=f"'lamp' is defined on magnitudes, and {name} prunes by"):
        pruner_of([torch.randn(4, 4)], Collectives(), contiguous_shards, 1, 0.5, method=method)


def test_methods_that_prune_by_magnitude_are_known():
    found = {name for name, method in METHODS.items() if method.prunes_by_magnitude()}
    assert found == {"gmp", "mgpp", "sparse-transfer"}


@pytest.mark.parametrize("pattern", ["2:4", "32x1"])
def test_patterns_are_refused(pattern):
    with pytest.raises(
        ValueError, match=f"'lamp' scores single weights, and pattern is '{pattern}'"
    ):
        Placement(scope="lamp", pattern=pattern)
