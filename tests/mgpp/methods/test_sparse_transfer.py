"""Keeping the zeros a model begins with: exact from the first step, in its figures and its state."""

import pytest
import torch
from torch import nn

import mgpp
from mgpp.methods import SparseTransfer
from tests.mgpp.ranks import contiguous_shards, per_weight_shards, run_ranks

CONFIG = mgpp.PruningConfig(method="sparse-transfer")


def make_model(share=0.6):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.Sequential(*[nn.Linear(9, 9) for _ in range(3)])})
    model["head"] = nn.Linear(9, 9)
    with torch.no_grad():
        for parameter in model["layers"].parameters():
            if parameter.dim() == 2:
                parameter[torch.rand(9, 9) < share] = 0.0
                parameter[0, 0] = -0.0  # a zero too
    return model


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    out = model["head"](model["layers"](torch.randn(4, 9, generator=generator)))
    out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def prunable(model):
    return [
        p.detach() for n, p in model.named_parameters() if n.startswith("layers") and p.dim() == 2
    ]


def test_zeros_stay_and_nothing_else_is_pruned():
    model = make_model()
    masks = [p != 0 for p in prunable(model)]
    num_zeros = sum(int((~mask).sum()) for mask in masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = mgpp.attach((model, optimizer), CONFIG, 10, 40)
    first = pruner.last_pruning
    assert (first.step, first.num_pruned, first.threshold) == (-1, num_zeros, 0.0)
    assert pruner.mask_sparsity == num_zeros / (3 * 81)
    assert pruner.schedule.phase(0) == "fixed mask"
    head = model["head"].weight.detach().clone()
    for seed in range(10):
        before = prunable(model)[0].clone()
        step(model, optimizer, seed)
        for weight, mask in zip(prunable(model), masks, strict=True):
            assert torch.equal(weight != 0, mask)
            assert not torch.signbit(weight[~mask]).any()
        moved = prunable(model)[0] != before
        assert torch.equal(moved | ~masks[0], torch.ones_like(moved))  # all that is kept is trained
    assert pruner.last_pruning == first
    assert pruner.mask_hash() == first.mask_hash
    assert pruner.num_zeros() == num_zeros
    assert (model["head"].weight != head).all()


def test_resumed_bit_for_bit_with_its_own_mask():
    def run(upto, state=None):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        begin = 0
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            begin = state["pruner"]["step"]
        pruner = mgpp.attach((model, optimizer), CONFIG, 10, 40)
        if state is not None:
            pruner.load_state_dict(state["pruner"])
        for seed in range(begin, upto):
            step(model, optimizer, seed)
        return model, optimizer, pruner

    whole, _, pruner = run(10)
    half, optimizer, half_pruner = run(4)
    # A weight that happens to be zero when the checkpoint is written is not pruned for it.
    kept = (prunable(half)[1] != 0).nonzero()[0]
    state = {
        "model": {k: v.clone() for k, v in half.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "pruner": half_pruner.state_dict(),
    }
    resumed, _, resumed_pruner = run(10, state)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed_pruner.last_pruning == pruner.last_pruning
    state["model"]["layers.1.weight"][tuple(kept)] = 0.0
    again, _, again_pruner = run(10, state)
    assert again_pruner.mask_hash() == pruner.last_pruning.mask_hash
    assert prunable(again)[1][tuple(kept)] != 0


@pytest.mark.parametrize("cut_into", [contiguous_shards, per_weight_shards])
def test_the_mask_does_not_depend_on_the_sharding_and_is_taken_up_on_another(cut_into):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((9, 7), (5, 3), (4, 33))]
    for weight in weights:
        weight[torch.rand(weight.shape, generator=generator) < 0.4] = 0.0
    shapes = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}

    def make(collectives, values):
        return mgpp.Pruner(
            cut_into(values, collectives.rank, collectives.world_size),
            shapes,
            method=SparseTransfer(),
            schedule=mgpp.PruningSchedule.fixed_mask(10),
            collectives=collectives,
        )

    saved = run_ranks(1, lambda c: make(c, weights).state_dict())[0]
    expected = saved["last_pruning"]
    assert expected["num_pruned"] == sum(int((w == 0).sum()) for w in weights)

    def resume(collectives):
        others = [
            torch.where(w.abs() < 0.3, 0.0, w) for w in weights
        ]  # more zeros than the mask has
        pruner = make(collectives, others)
        assert pruner.last_pruning.num_pruned > expected["num_pruned"]
        pruner.load_state_dict(saved)
        return vars(pruner.last_pruning), pruner.mask_hash()

    found = run_ranks(3, lambda c: vars(make(c, weights).last_pruning))
    assert found == [expected] * 3
    assert run_ranks(3, resume) == [(expected, expected["mask_hash"])] * 3


def test_a_model_that_was_not_pruned_is_refused():
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    with pytest.raises(
        ValueError, match=r"0 of the 243 prunable weights are zero.*no mask to keep"
    ):
        mgpp.attach((model, torch.optim.SGD(model.parameters())), CONFIG, 10, 40)


@pytest.mark.parametrize(
    "config", [{"sparsity": 0.9}, {"initial_sparsity": 0.1}, {"start_after": 5}, {"interval": 3}]
)
def test_a_schedule_is_refused(config):
    (key,) = config
    with pytest.raises(
        ValueError, match=f"{key}: means nothing .* which keeps the zeros of the model"
    ):
        mgpp.PruningConfig(method="sparse-transfer", **config)


def test_the_schedule_prunes_at_no_step():
    schedule = mgpp.PruningSchedule.fixed_mask(7)
    assert schedule.prune_start == schedule.prune_end == -1
    assert not any(schedule.is_pruning_step(step) for step in range(7))
    assert {schedule.phase(step) for step in range(7)} == {"fixed mask"}
    assert schedule.progress(0) == 1.0
