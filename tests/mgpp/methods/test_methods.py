"""Methods on few weights: against their published updates, and their state in other cuts.

Whole trainings are compared with the papers' equations, under every ZeRO stage, in test_zero.py.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mgpp import METHODS, Pruner, PruningSchedule, Shard, make_method, settings_of
from mgpp.backends.torch import attach
from tests.mgpp.ranks import contiguous_shards, per_weight_shards, run_ranks

SCHEDULE = PruningSchedule(
    num_steps=20,
    warmup_steps=4,
    finetune_steps=3,
    interval=4,
    initial_sparsity=0.2,
    final_sparsity=0.7,
)
SHAPES = [(9, 7), (5, 3), (4, 33)]
KEEPING = [name for name, method in METHODS.items() if method.state_names]


def train(method, schedule=SCHEDULE, num_steps=None, factor=lambda step: 1.0, after=lambda p: None):
    """Train one matrix by Adam with gradients drawn at random; the pruner, and what `after` saw."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(11, 5, generator=generator))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    pruner = attach(optimizer, {"w": weight}, method=method, schedule=schedule)
    seen = []
    for _ in range(num_steps or schedule.num_steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(11, 5, generator=generator)
        grad, lr = weight.grad.clone(), optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        seen.append((before, grad, lr, after(pruner)))
    return pruner, seen


def score_of(pruner):
    return pruner.method.score(pruner.shards[0]).clone()


def published_scores(sensitivities, beta1, beta2, interval):
    """Scores at each step, as `update_ipt_with_local_window` of PLATON and of PINS computes them."""
    ipt = exp_avg_ipt = exp_avg_unc = torch.zeros_like(sensitivities[0])
    for step, sensitivity in enumerate(sensitivities):
        local_step = step % interval
        if local_step == 0:
            exp_avg_ipt = beta1 * exp_avg_ipt + (1 - beta1) * ipt
            exp_avg_unc = beta2 * exp_avg_unc + (1 - beta2) * (ipt - exp_avg_ipt).abs()
            ipt = sensitivity
        else:
            ipt = (ipt * local_step + sensitivity) / (local_step + 1)
        yield exp_avg_ipt * exp_avg_unc


def test_platon_scores_as_its_published_code():
    _, seen = train(
        make_method("platon", num_examples=1),
        after=lambda p: (score_of(p), p.shards[0].weight.clone()),
    )
    found = [score for *_, (score, _) in seen]
    # Before pruning changes them, the updated weights times the gradients that updated them.
    grads = [grad.view(-1) for _, grad, _, _ in seen]
    weights = [weight for *_, (_, weight) in seen]
    end = SCHEDULE.prune_start  # its own weights are seen only once they are pruned
    published = list(
        published_scores(
            [(w * g).abs() for w, g in zip(weights, grads, strict=True)], 0.85, 0.95, 4
        )
    )
    for step in range(end + 1):
        torch.testing.assert_close(found[step], published[step])
    assert found[end].count_nonzero() == 55


@pytest.mark.parametrize("beta1", [0.0, 0.85])
def test_pins_scores_as_its_published_code(beta1):
    """The published code sees weights before their update, so all steps can be compared."""
    _, seen = train(
        make_method({"name": "pins", "beta1": beta1}, num_examples=1),
        factor=lambda step: 1 / (1 + step),
        after=score_of,
    )
    sensitivities = [(-w * g + lr * g * g).abs().view(-1) for w, g, lr, _ in seen]
    assert len({lr for *_, lr, _ in seen}) == SCHEDULE.num_steps
    published = list(published_scores(sensitivities, beta1, 0.99, 4))
    for step in range(SCHEDULE.prune_end + 1):
        torch.testing.assert_close(seen[step][-1], published[step])


@pytest.mark.parametrize("name", ["platon", "pins"])
def test_a_pruning_at_the_first_step_goes_by_that_step(name):
    at_once = PruningSchedule(
        num_steps=20,
        warmup_steps=0,
        finetune_steps=3,
        interval=4,
        initial_sparsity=0.4,
        final_sparsity=0.7,
    )
    pruner, seen = train(make_method(name, num_examples=1), at_once, 1, after=score_of)
    assert seen[0][-1].count_nonzero() == 55
    assert pruner.last_pruning.num_pruned == 22
    assert pruner.last_pruning.threshold > 0


def test_scores_of_soft_movement_follow_the_learning_rate_and_its_penalty_the_cubic():
    """One matrix, nothing pruned: what is left is Adam on w grad, with its own rate, and the penalty."""
    schedule = PruningSchedule(
        num_steps=20, warmup_steps=4, finetune_steps=3, interval=4, final_sparsity=0.0
    )
    method = make_method({"name": "soft-movement", "score_lr": 0.02, "penalty": 30}, num_examples=1)
    pruner, seen = train(method, schedule, factor=lambda step: 1 / (1 + step))
    score = nn.Parameter(torch.zeros(11, 5))
    adam = torch.optim.Adam([score], lr=0.02)
    for step, (weight, grad, lr, _) in enumerate(seen[: schedule.prune_end + 1]):
        adam.param_groups[0]["lr"] = 0.02 * lr / 0.1
        threshold = 1 - (1 - max(step - 4, 0) / 12) ** 3  # of the published tau, in its final one
        adam.zero_grad()
        ((score * grad * weight).sum() + 30 * threshold * score.sigmoid().mean()).backward()
        adam.step()
    torch.testing.assert_close(method.state(pruner.shards[0])["score"], score.detach().view(-1))
    assert method.log_values(3, schedule) == method.log_values(4, schedule) == {"penalty": 0.0}
    assert method.log_values(16, schedule) == {"penalty": 30.0}


def test_the_threshold_of_soft_movement_is_the_papers():
    """sigmoid(S) > tau keeps what is kept, to the last bit but one."""
    seen = []

    def after(pruner):
        state = {k: v.clone() for k, v in pruner.method.state(pruner.shards[0]).items()}
        seen.append((pruner.last_pruning, state["score"], pruner.mask(pruner.shards[0])))

    train(make_method({"name": "soft-movement", "penalty": 3}, num_examples=1), after=after)
    prunings = [(p, s, m) for i, (p, s, m) in enumerate(seen) if p and p.step == i]
    assert len(prunings) == 4
    for pruning, score, keep in prunings:
        assert score[~keep].max() < score[keep].min()
        assert pruning.threshold == pytest.approx(float(score[~keep].max().sigmoid()), rel=1e-6)


@pytest.mark.parametrize("name", ["movement", "soft-movement"])
def test_what_is_pruned_moves_on_behind_the_mask_by_momentum_alone(name):
    """As a weight does that the forward pass multiplies by a mask of 0 and Adam updates."""
    method = make_method(name, num_examples=1)
    behind = []

    def after(pruner):
        state = method.state(pruner.shards[0])
        behind.append((state["pruned_weight"].clone(), pruner.mask(pruner.shards[0])))

    _, seen = train(method, num_steps=8, after=after)
    keep = behind[4][1]  # of the first pruning; it holds until the next, at step 8
    assert 0 < int((~keep).sum()) < 55
    whole = nn.Parameter(torch.zeros(11, 5))
    adam = torch.optim.Adam([whole], lr=0.1)
    for step, (weight, grad, _, _) in enumerate(seen):
        if step <= 4:
            whole.data.copy_(weight)
        whole.grad = grad if step <= 4 else grad * keep.view(11, 5)
        adam.step()
    torch.testing.assert_close(behind[7][0], (whole.detach().view(-1) * ~keep))
    assert (behind[7][0] - behind[4][0])[~keep].abs().min() > 0
    assert not behind[7][0][keep].any()


def train_shards(name, collectives, cut_into, first, last, saved=None):
    """Take steps of plain gradient descent from `first` to before `last`, on this rank's shards."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    grads = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(last)]
    shards = cut_into(weights, collectives.rank, collectives.world_size)
    names = {f"layers.{i}.weight": shape for i, shape in enumerate(SHAPES)}
    pruner = Pruner(
        shards,
        names,
        method=make_method(name, num_examples=10),
        schedule=SCHEDULE,
        collectives=collectives,
        group={"lr": 0.1},
    )
    if saved is not None:
        pruner.load_state_dict(saved["pruner"])
        for shard in shards:
            here = slice(shard.offset, shard.offset + shard.numel)
            shard.weight.copy_(saved["weights"][shard.index][here])
    for shard in shards:
        shard.flat.grad = torch.zeros_like(shard.flat)
    for step in range(first, last):
        for shard in shards:
            whole = grads[step][shard.index].reshape(-1)
            shard.grad.copy_(whole[shard.offset : shard.offset + shard.numel])
        pruner.before_update(shards)
        for shard in shards:
            shard.weight.sub_(0.1 * shard.grad)
        pruner.after_update(shards)
        pruner.finish_step()
    return pruner


def joined(pruners):
    """What the ranks hold, as one state, and by weight and key whole."""
    whole = {}
    for pruner in pruners:
        for shard in pruner.shards:
            for key, values in {"w": shard.weight, **pruner.method.state(shard)}.items():
                full = whole.setdefault((shard.index, key), torch.zeros(shard.full_numel))
                full[shard.offset : shard.offset + shard.numel] = values
    states = [pruner.state_dict() for pruner in pruners]
    state = {**states[0], "masks": [mask for each in states for mask in each["masks"]]}
    return whole, {"pruner": state, "weights": [whole[i, "w"] for i in range(len(SHAPES))]}


@pytest.mark.parametrize("cut_into", [contiguous_shards, per_weight_shards])
@pytest.mark.parametrize("stop", [3, 10, 18])
@pytest.mark.parametrize("name", KEEPING)
def test_a_state_goes_on_in_any_other_cut(name, stop, cut_into):
    def run(ranks, cut, first, last, saved=None):
        return run_ranks(ranks, lambda c: train_shards(name, c, cut, first, last, saved))

    undisturbed = run(2, contiguous_shards, 0, 20)
    expected, _ = joined(undisturbed)
    _, saved = joined(run(2, contiguous_shards, 0, stop))
    resumed = run(3, cut_into, stop, 20, saved)
    assert resumed[0].last_pruning == undisturbed[0].last_pruning
    found, _ = joined(resumed)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-6, atol=1e-7)
    same, _ = joined(run(2, contiguous_shards, stop, 20, saved))
    assert all(torch.equal(same[key], values) for key, values in expected.items())


@pytest.mark.parametrize("name", KEEPING)
def test_shards_on_a_gpu_are_not_mixed_with_anything_on_the_cpu(name):
    """Tensors without data, of devices that need not be there; torch refuses to mix them."""
    # Coupled, the prior is a kernel of Triton there, which needs a real device.
    settings = {"decoupled": True} if name.startswith("mgpp") else {}
    method = make_method({"name": name, **settings}, num_examples=1)
    with FakeTensorMode():
        flat = nn.Parameter(torch.empty(300_000, device="cuda"))
        flat.grad = torch.empty(300_000, device="cuda")
        shard = Shard(
            name="w", index=0, full_shape=(7, 3), offset=0, numel=290_000, flat=flat, start=10
        )
        method.kept = lambda shard: torch.ones(shard.numel, dtype=torch.bool, device="cuda")
        for step in (0, 1, SCHEDULE.prune_start):
            method.adjust_grad(shard, step, SCHEDULE)
            method.observe(shard, step, SCHEDULE)
        kept = {method.score(shard), *method.state(shard).values()}
        assert {(tensor.device.type, tensor.dtype) for tensor in kept} == {("cuda", torch.float32)}


def test_what_is_kept_is_float32_whatever_the_default():
    shard = train(make_method("gmp", num_examples=1))[0].shards[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = make_method("soft-movement", num_examples=1).state(shard)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {values.dtype for values in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "setting", "value", "allowed"),
    [
        ("soft-movement", "score_lr", 0, "greater than 0"),
        ("soft-movement", "penalty", -1, "at least 0"),
        ("pins", "beta1", 1, "less than 1"),
        ("pins", "beta2", -0.1, "at least 0"),
        ("platon", "beta1", 1.5, "less than 1"),
    ],
)
def test_settings_out_of_range_are_named(name, setting, value, allowed):
    with pytest.raises(ValueError, match=f"{setting} must be {allowed}, got {value}"):
        make_method({"name": name, setting: value}, num_examples=1)


def test_every_setting_is_described():
    for method in METHODS.values():
        assert all(entry.metadata["description"].endswith(".") for entry in settings_of(method))
