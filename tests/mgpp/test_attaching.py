"""Attaching in a loop of one's own: what is taken, what is refused, and that it is the same pruning."""

import numpy
import pytest
import torch
from torch import nn

import mgpp
from mgpp.backends import torch as torch_backend

CONFIG = mgpp.PruningConfig(
    sparsity=0.7, initial_sparsity=0.2, start_after=2, finetune=0.25, interval=3
)


class Wrapped(nn.Module):
    """As DistributedDataParallel wraps a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class WrappedOptimizer(torch.optim.Optimizer):
    """As Accelerate wraps an optimizer: a class of the same kind whose own hooks never run."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.Sequential(*[nn.Linear(9, 9) for _ in range(3)])})


def train(attach, wrap=lambda model, optimizer: (model, optimizer)):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = wrap(model, optimizer)
    pruner = attach(model, optimizer)
    inner = model.module if isinstance(model, Wrapped) else model
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        inner["layers"](torch.randn(4, 9, generator=generator)).square().mean().backward()
        optimizer.step()
        inner.zero_grad()
    return pruner, torch.cat([p.detach().view(-1) for p in inner.parameters()])


def by_hand(model, optimizer):
    prunable = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    schedule = mgpp.PruningSchedule(
        num_steps=20,
        warmup_steps=2,
        finetune_steps=5,
        interval=3,
        initial_sparsity=0.2,
        final_sparsity=0.7,
    )
    method = mgpp.MGPP(num_examples=80)
    return torch_backend.attach(optimizer, prunable, method=method, schedule=schedule)


@pytest.mark.parametrize(
    "wrap", [lambda m, o: (m, o), lambda m, o: (Wrapped(m), WrappedOptimizer(o))]
)
def test_it_is_the_pruning_of_the_backend(wrap):
    pruner, weights = train(lambda m, o: mgpp.attach((m, o), CONFIG, 20, 80), wrap)
    expected_pruner, expected = train(by_hand)
    assert torch.equal(weights, expected)
    assert pruner.mask_hash() == expected_pruner.mask_hash()
    assert pruner.num_zeros() == int(3 * 81 * 0.7)


def test_gmp_leaves_the_gradients_alone():
    config = {"sparsity": 0.5, "method": "gmp", "start_after": 0, "finetune": 0}
    pruner, _ = train(lambda m, o: mgpp.attach((m, o), config, 20, 80))
    assert isinstance(pruner.method, mgpp.GMP)


class Conv1D(nn.Module):
    """As GPT-2 has it: inputs first."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def test_placements_in_a_loop_of_one_s_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"h": nn.Sequential(Conv1D(12, 7), nn.Linear(7, 12), Conv1D(12, 5))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {
        "sparsity": 0.5,
        "start_after": 0,
        "finetune": 0,
        "method": "gmp",
        "include": ["h.*.weight"],
        "exclude": ["h.1.*"],
        "scope": "uniform",
        "pattern": "3:6",
    }
    pruner = mgpp.attach((model, optimizer), config, 2, 80)
    for _ in range(2):
        model["h"](torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
    assert pruner.num_zeros() == 6 * 7 + 6 * 5
    for layer in (0, 2):
        groups = model["h"][layer].weight.detach().view(2, 6, -1)
        assert bool(((groups != 0).sum(dim=1) == 3).all())


def test_parameter_groups_put_the_prunable_weights_first():
    first, *others = mgpp.parameter_groups(make_model(), CONFIG, weight_decay=0.1)
    assert [p.shape for p in first["params"]] == [(9, 9)] * 3
    assert first["weight_decay"] == 0.1
    assert [(len(g["params"]), g["weight_decay"]) for g in others] == [(3, 0.0)]


def thresholds_of(method, factors, peak):
    """Return the spike threshold at each step of an optimizer whose scheduler has these factors."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
    config = {"sparsity": 0.5, "start_after": 1, "finetune": 0, "interval": 1, "method": method}
    pruner = mgpp.attach((model, optimizer), config, len(factors) - 1, 80)
    found = []
    for _ in factors[1:]:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        slab_prob = 0.1  # where the threshold is meant; annealing moves it from there
        found.append(pruner.method.prior.spike_threshold(slab_prob))
        scheduler.step()
    return found


def test_the_spike_threshold_in_learning_rates():
    factors, peak = [0.0, 0.5, 1.0, 0.5, 0.1], 2e-3
    method = {"name": "mgpp", "spike_threshold": 1.5}
    assert thresholds_of(method, factors, peak) == pytest.approx([3e-3] * 4)
    # A rate of zero moves nothing; the prior is then that of the peak.
    expected = [3e-3, 1.5e-3, 3e-3, 1.5e-3]
    following = {**method, "spike_follows_lr": True}
    assert thresholds_of(following, factors, peak) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "sparsity: missing"),
        ({"sparsity": 0.9, "sparsty": 0.8}, "sparsty: unknown key; allowed are method, sparsity, "),
        ({"sparsity": 1.0}, "sparsity must be less than 1, got 1"),
        ({"sparsity": 90}, "sparsity must be less than 1, got 90; it is a share: 90% is 0.9"),
        ({"sparsity": "90%"}, "sparsity must be a number, got '90%'"),
        ({"sparsity": False}, "sparsity must be a number, got False"),
        ({"sparsity": float("nan")}, "sparsity must be a number, got nan"),
        ({"sparsity": 0.5, "interval": True}, "interval must be a number, got True"),
        ({"sparsity": 0.5, "interval": 2.5}, "interval must be a whole number, got 2.5"),
        ({"sparsity": 0.5, "min_kept": "0.1"}, "min_kept must be a number, got '0.1'"),
        (
            {"sparsity": 0.5, "budgets": {"layers.*": True}},
            r"'layers\.\*' must be a number, got True",
        ),
        (
            {"sparsity": 0.5, "method": {"name": "mgpp", "spike_var": "1e-9"}},
            "spike_var must be a number, got '1e-9'",
        ),
        ({"sparsity": 0.5, "warmup": 3}, "warmup: renamed to start_after"),
        ({"sparsity": 0.5, "start_after": "2ep"}, "start_after: '2ep' is in epochs"),
        ({"sparsity": 0.5, "method": "wanda"}, "wanda prunes once and trains nothing"),
        ({"sparsity": 0.9, "method": "moving"}, "method: got 'moving'; allowed are "),
        (
            {"sparsity": 0.9, "method": {"name": "gmp", "beta1": 0.5}},
            "beta1 is no setting of gmp; allowed are none",
        ),
        (
            {"sparsity": 0.9, "method": {"name": "mgpp", "spike_var": 1e-9, "spike_threshold": 1}},
            "give spike_var or spike_threshold, not both",
        ),
        (
            {"sparsity": 0.9, "method": {"name": "mgpp", "spike_follows_lr": True}},
            "spike_follows_lr needs spike_threshold",
        ),
        (
            {"sparsity": 0.9, "method": {"name": "platon", "beta1": 1.0}},
            "beta1 must be less than 1, got 1.0",
        ),
        ({"sparsity": 0.9, "start_after": 1.5}, "start_after: got 1.5; allowed are steps"),
        ({"sparsity": 0.9, "finetune": -1}, "finetune: got -1"),
        ({"sparsity": 0.9, "start_after": 0.6, "finetune": 0.6}, "prune_start"),
        ({"sparsity": 0.9, "include": ["nothing.*"]}, "nothing"),
        ({"sparsity": 0.9, "scope": "matrix"}, "scope: got 'matrix'; allowed are global"),
        ({"sparsity": 0.9, "min_kept": 0.2}, "sparsity: got 0.9, but min_kept 0.2 allows 0.8"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "weight has 9 inputs, which do not divide by 4"),
        ({"sparsity": 0.5, "budgets": {"heads.*": 0.9}}, "matches no prunable weight"),
        (
            {"sparsity": 0.9, "method": {"name": "mgpp", "spike_var": 1.0}},
            "0 < spike_var < slab_var",
        ),
    ],
)
def test_settings_that_are_wrong(config, problem):
    model = make_model()
    with pytest.raises(ValueError, match=problem):
        mgpp.attach((model, torch.optim.SGD(model.parameters())), config, 20, 80)


def test_steps_that_are_not_whole_are_refused():
    """As of a number of batches divided by those that are accumulated."""
    model = make_model()
    pair = model, torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"num_steps must be a whole number, got 12\.5"):
        mgpp.attach(pair, CONFIG, 100 / 8, 80)


@pytest.mark.parametrize("num_examples", [float("nan"), float("inf"), True, 1.5, "9", None, 0, -3])
def test_numbers_of_examples_that_are_none(num_examples):
    model = make_model()
    pair = model, torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"^num_examples must be "):
        mgpp.attach(pair, CONFIG, 20, num_examples)


@pytest.mark.parametrize("num_steps", [float("nan"), float("inf"), True, "20", None, 0, -3])
def test_numbers_of_steps_that_are_none(num_steps):
    model = make_model()
    pair = model, torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"^num_steps must be "):
        mgpp.attach(pair, CONFIG, num_steps, 80)


def test_whole_numbers_of_any_type_are_numbers():
    model = make_model()
    pair = model, torch.optim.SGD(model.parameters())
    pruner = mgpp.attach(pair, CONFIG, 40 / 2, numpy.int64(80))
    assert (pruner.schedule.num_steps, pruner.method.num_examples) == (20, 80)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": 5}, "method: got 5; allowed are mgpp, "),
        ({"method": None}, "method: got None; allowed are mgpp, "),
        ({"method": ["mgpp"]}, r"method: got \['mgpp'\]; allowed are mgpp, "),
        ({"method": {"name": ["x"]}}, r"method: got \['x'\]; allowed are mgpp, "),
        ({"method": {}}, "method: got None; allowed are mgpp, "),
        ({"initial_sparsity": None}, "initial_sparsity must be a number, got None"),
        ({"interval": None}, "interval must be a number, got None"),
        ({"min_kept": None}, "min_kept must be a number, got None"),
        ({"start_after": None}, "start_after: got None; allowed are steps"),
        ({"method": {"name": "mgpp", "slab_var": None}}, "slab_var must be a number, got None"),
        ({"method": {"name": "mgpp", "decoupled": 1}}, "decoupled must be true or false, got 1"),
        (
            {"method": {"name": "mgpp", "decoupled": "no"}},
            "decoupled must be true or false, got 'no'",
        ),
        ({"include": [1]}, r"include: got \[1\]; give a list of patterns"),
        ({"include": None}, "include: got None; give a list of patterns"),
        ({"include": 3}, "include: got 3; give a list of patterns"),
        ({"exclude": {"a": 1}}, "exclude: got {'a': 1}; give a list of patterns"),
        ({"exclude": b"layers"}, "exclude: got b'layers'; give a list of patterns"),
        ({"budgets": [1]}, r"budgets: got \[1\]; "),
        ({"budgets": {1: 0.5}}, "budgets: "),
        ({"scope": []}, r"scope: got \[\]; allowed are global"),
        ({"scope": None}, "scope: got None; allowed are global"),
    ],
)
def test_settings_of_another_type(settings, problem):
    with pytest.raises((ValueError, TypeError), match=f"^{problem}"):
        mgpp.PruningConfig(**{"sparsity": 0.5, **settings})


def test_targets_that_are_wrong():
    model, other = make_model(), make_model()
    with pytest.raises(TypeError, match="a pair"):
        mgpp.attach(model, CONFIG, 20, 80)
    with pytest.raises(TypeError, match="need a torch optimizer, got str"):
        mgpp.attach((model, "adam"), CONFIG, 20, 80)
    with pytest.raises(ValueError, match=r"layers\.0\.weight is not in the optimizer"):
        mgpp.attach((model, torch.optim.SGD(other.parameters())), CONFIG, 20, 80)
    with pytest.raises(TypeError, match="include: got a string"):
        mgpp.PruningConfig(sparsity=0.5, include="layers.*")


class Unused(nn.Module):
    """A matrix that takes no part in the loss, beside one that does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(9, 9, bias=False) for _ in range(2)])

    def forward(self, x):
        return self.layers[0](x).square().mean()


def test_a_weight_without_a_gradient_has_one_of_zeros():
    """As with a gradient of zeros that is there; and without any backward it is refused."""
    ended = []
    for whole in (False, True):
        torch.manual_seed(0)
        model = Unused()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        pruner = mgpp.attach((model, optimizer), CONFIG, 20, 80)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.ones(4, 9)).backward()
            if whole:
                model.layers[1].weight.grad = torch.zeros(9, 9)
            optimizer.step()
        assert pruner.finish() == int(162 * 0.7) / 162
        ended.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    assert torch.equal(*ended)
    assert (ended[0][81:] == 0).any()
    optimizer.zero_grad()
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mgpp.attach((model, fresh), CONFIG, 20, 80)
    with pytest.raises(RuntimeError, match="no gradient at the optimizer step"):
        fresh.step()
