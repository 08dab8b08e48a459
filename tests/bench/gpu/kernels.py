"""Every operator of `mgpp`, the prior and whole prunings on the device against the same on the CPU."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgpp import MGPP, MixtureGaussianPrior, Placement, Pruner, PruningSchedule, log_prior
from mgpp.masking import lamp
from mgpp.prior import add_prior_grad_, shrink_
from mgpp.sharding import counting, displacement, masks
from mgpp.sharding.bitmask import pack_bits
from tests.bench.gpu.figures import Figure
from tests.bench.gpu.process import as_on_a_gpu
from tests.mgpp.ranks import contiguous_shards, per_weight_shards

PLACEMENTS = {
    "global": Placement(),
    "uniform": Placement(scope="uniform"),
    "layer": Placement(scope="layer", budgets={"*.1.*": 0.75}, min_kept=0.1),
    "lamp": Placement(scope="lamp"),
    "n-of-m": Placement(pattern="2:4", scope="uniform"),
    "blocks": Placement(pattern="4x1"),
}
SCHEDULE = PruningSchedule(
    num_steps=4,
    warmup_steps=0,
    finetune_steps=1,
    interval=1,
    initial_sparsity=0.3,
    final_sparsity=0.5,
)
PRIOR, NUM_EXAMPLES, SLAB_PROB = MixtureGaussianPrior(spike_var=1e-6, slab_var=0.05), 500, 0.1
_MATRIX = 5000  # elements of each matrix of the stacks


def measure(size: Mapping[str, Any], device: torch.device, folder: Path) -> Iterator[Figure]:
    """Compare bit for bit; the prior's floating-point arithmetic to a few parts in 1e5."""
    operators = _operators(size["numels"])
    names = {name.removeprefix("mgpp::") for name in _registered()}
    yield _checked(
        "operators",
        "every operator is compared below",
        lambda: _same_names(names, {operator.__name__ for operator, _ in operators}),
    )
    for operator, calls in operators:
        yield _checked(
            f"operator_{operator.__name__}",
            "equals its implementation for the CPU, bit for bit",
            partial(_compare, operator, calls, device),
        )
    for name, work in {"prior_gradient": _prior_gradient, "prior_shrinking": _shrinking}.items():
        yield _checked(name, "equals float64 on the CPU", partial(work, device))
    for name, placement in PLACEMENTS.items():
        yield _checked(
            f"pruning_{name}",
            "prunings equal those of the CPU, bit for bit",
            partial(_prunings, placement, size["matrices"], device),
        )


def _checked(key: str, text: str, work: Callable[[], None]) -> Figure:
    problem = ""
    try:
        work()
    except Exception:  # noqa: BLE001  (reported as this check's)
        problem = traceback.format_exc()
    return Figure(key=key, text=text, value=not problem, detail=problem)


def _registered() -> list[str]:
    return [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mgpp::")]


def _same_names(registered: set[str], compared: set[str]) -> None:
    assert registered == compared, f"registered: {registered}, compared: {compared}"


# Operators.


def _operators(numels: Sequence[int]) -> list[tuple[Any, list[tuple[Any, ...]]]]:
    """Return every operator with the arguments of some calls.

    Values are tied, of either sign and not finite; ranges begin anywhere in a stack of matrices.
    """
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) * 0.04 for n in numels]
    for value in values:
        value[::3] = 0.0
        value[1::7] = -0.0
        value[2::11] = 0.03125
    values[2][5], values[2][6], values[2][7] = float("inf"), -float("inf"), 1e-41
    places, num_matrices = [], 0
    for number, numel in enumerate(numels):
        offset = 13 * number
        places += [num_matrices, offset, _MATRIX]
        num_matrices += (offset + numel) // _MATRIX + 1
    cuts = torch.full((num_matrices,), 0.03125).view(torch.int32)
    cuts[1::3] = 0
    cuts[2::3] = counting.pattern_of(0.05)
    equal = counting.count_around(values, places, cuts)[1]
    until = torch.arange(num_matrices) * 7 % _MATRIX
    groups = torch.arange(num_matrices) % 4 - 1
    magnitudes = torch.linspace(0.01, 0.05, num_matrices)
    keep, before = (
        [pack_bits(torch.rand(n, generator=generator) < share) for n in numels]
        for share in (0.4, 0.6)
    )
    firsts = [sum(numels[:i]) + 3 for i in range(len(numels))]
    tops = lamp.largest_patterns(values, places, num_matrices) >> lamp._SHIFT
    lowest = (tops.long() - lamp.NUM_BINS + 1).clamp(min=0)
    digits = [(20, 11, [0, 0, 0]), (9, 11, [0x3C000000, 0, 0x3D000000])]
    return [
        (
            counting.count_digits,
            [(values, places, groups, torch.tensor(lows), s, 1 << b) for s, b, lows in digits],
        ),
        (counting.count_around, [(values, places, cuts)]),
        (
            counting.nth_equal,
            [(values, places, cuts, nth) for nth in (equal, (equal + 1) // 2, equal.clamp(max=1))],
        ),
        (displacement.count_displacements, [(values, places, keep, magnitudes)]),
        (lamp.largest_patterns, [(values, places, num_matrices)]),
        (lamp.count_magnitudes, [(values, places, lowest, 1, num_matrices - 2)]),
        (masks.zero_pruned_, [(values, keep)]),
        (masks.keep_above, [(values, places, cuts, until)]),
        (masks.compare_masks, [(keep, before, list(numels), firsts)]),
    ]


def _compare(operator: Any, calls: list[tuple[Any, ...]], device: torch.device) -> None:
    for call in calls:
        here, there = _copied(call, torch.device("cpu")), _copied(call, device)
        expected = operator(*here)
        with as_on_a_gpu(device.type):
            found = operator(*there)
        pairs = zip(_tensors((expected, here)), _tensors((found, there)), strict=True)
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs.cpu())


def _copied(thing: Any, device: torch.device) -> Any:
    if isinstance(thing, Tensor):
        return thing.to(device, copy=True)
    is_many = isinstance(thing, list | tuple)
    return type(thing)(_copied(part, device) for part in thing) if is_many else thing


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        # As bits: -0.0 is not 0.0, and what is no number equals itself.
        yield thing.view(torch.int32) if thing.is_floating_point() else thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _tensors(part)


# The prior.


def _spread_weights() -> Tensor:
    """Return float32 weights from far inside the spike to the tail of the slab, and zeros."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(70_001, generator=generator) * torch.logspace(-9, 0.5, 70_001)
    weights[::7] = 0.0
    return weights


def _prior_gradient(device: torch.device) -> None:
    weights = _spread_weights()
    exact = weights.double().requires_grad_()
    (-log_prior(exact, PRIOR, SLAB_PROB).sum() / NUM_EXAMPLES).backward()
    gradient = torch.zeros_like(weights, device=device)
    settings: dict[str, Any] = {"prior": PRIOR, "slab_prob": SLAB_PROB}
    with as_on_a_gpu(device.type):
        add_prior_grad_(gradient, weights.to(device), num_examples=NUM_EXAMPLES, **settings)
    torch.testing.assert_close(gradient.cpu().double(), exact.grad, rtol=2e-5, atol=1e-6)


def _shrinking(device: torch.device) -> None:
    weights = _spread_weights()
    settings: dict[str, Any] = {"prior": PRIOR, "slab_prob": SLAB_PROB, "step_size": 1e-6}
    exact = weights.double().requires_grad_()
    # What the step divides by, of the gradient: w (1 + step_size g(w) / w), g the prior's alone.
    (-log_prior(exact, PRIOR, SLAB_PROB).sum()).backward()
    assert exact.grad is not None
    rate = torch.where(exact == 0, 0.0, exact.grad / exact) * settings["step_size"]
    expected = (exact / (1 + rate)).detach()
    found = weights.to(device)
    with as_on_a_gpu(device.type):
        shrink_(found, **settings)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-5, atol=1e-9)


# Prunings.


def _prunings(placement: Placement, matrices: Sequence[int], device: torch.device) -> None:
    number, *shape = matrices
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) * 0.04 for _ in range(number)]
    weights[1] = (weights[1] * 100).round() / 100  # ties
    for cut_into in (contiguous_shards, per_weight_shards):
        expected = _pruned(weights, placement, cut_into, torch.device("cpu"))
        with as_on_a_gpu(device.type):
            found = _pruned(weights, placement, cut_into, device)
        assert found == expected


def _pruned(
    weights: list[Tensor], placement: Placement, cut_into: Any, device: torch.device
) -> list[dict[str, Any]]:
    """Prune twice, the weights moved in between; return what is recorded."""
    shards = cut_into([weight.to(device) for weight in weights], 0, 1)
    pruner = Pruner(
        shards,
        {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)},
        method=MGPP(num_examples=NUM_EXAMPLES),
        schedule=SCHEDULE,
        placement=placement,
    )
    found: list[dict[str, Any]] = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        for shard in shards:
            shard.weight.add_(torch.randn(shard.numel, generator=generator).to(device) * 0.01)
        pruning = pruner.finish_step()
        assert pruning is not None
        found.append(vars(pruning) | pruner.sparsity_by_weight() | {"zeros": pruner.num_zeros()})
    return found
