"""The kernels for GPUs against the same in plain torch; without a GPU, Triton's interpreter runs them.

Values are tied, of either sign and not finite; shards begin anywhere in a stack and end within a byte.
"""

import importlib.util

import pytest
import torch

from mgpp.masking import lamp
from mgpp.sharding import counting, displacement, masks
from mgpp.sharding.bitmask import pack_bits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; torch's builds for GPUs bring it",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# First matrix, first element, elements of a matrix; and how many elements are held: also none.
PLACES = [0, 0, 35, 1, 20, 60, 5, 7, 3000, 9, 0, 70_001, 10, 4, 4]
NUMELS = [35, 131, 8191, 70_001, 0]
NUM_MATRICES = 11


def kernels(name):
    return importlib.import_module(f"mgpp.kernels.{name}")


def on_device(given):
    if isinstance(given, torch.Tensor):
        return given.to(DEVICE)
    is_tensors = isinstance(given, list) and isinstance(given[0], torch.Tensor)
    return [t.to(DEVICE, copy=True) for t in given] if is_tensors else given


def check(kernel, operator, *args):
    """Hold a kernel against its operator on the CPU, bit for bit; both may change their arguments."""
    ours, theirs = [on_device(a) for a in args], [on_device(a) for a in args]
    found, expected = kernel(*ours), operator(*[on_cpu(a) for a in theirs])
    pairs = [(found, expected)] if expected is not None else [(ours[0], theirs[0])]
    for a, b in pairs:
        for x, y in zip(*((t if isinstance(t, list) else [t]) for t in (a, b)), strict=True):
            assert torch.equal(x.cpu(), on_cpu(y)), operator
            assert x.dtype == y.dtype


def on_cpu(given):
    if isinstance(given, torch.Tensor):
        return given.cpu()
    return [on_cpu(a) for a in given] if isinstance(given, list) else given


def make_values():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) * 0.04 for n in NUMELS]
    for value in values:
        value[::3] = 0.0
        value[1::7] = -0.0
        value[2::11] = 0.03125
    values[2][5], values[2][6], values[2][7] = float("inf"), -float("inf"), 1e-41
    return values


def make_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    return [pack_bits(torch.rand(n, generator=generator) < 0.4) for n in NUMELS]


def cuts_of(magnitude):
    bits = torch.full((NUM_MATRICES,), magnitude).view(torch.int32)
    bits[3] = 0
    return bits


def test_digits():
    groups = torch.tensor([0, 1, 1, 1, -1, 2, 2, 2, 0, 1, -1])
    for shift, bits, lows in ((20, 11, [0, 0, 0]), (9, 11, [0x3C000000, 0, 0x3D000000])):
        check(
            kernels("counting").count_digits,
            counting.count_digits,
            make_values(),
            PLACES,
            groups,
            torch.tensor(lows),
            shift,
            1 << bits,
        )


def test_counts_around_a_cut_and_the_nth_that_equals_it():
    for magnitude in (0.0, 0.03125, 0.05):
        args = make_values(), PLACES, cuts_of(magnitude)
        check(kernels("counting").count_around, counting.count_around, *args)
        equal = counting.count_around(*args)[1]
        for nth in (equal, (equal + 1) // 2, equal.clamp(max=1)):
            check(kernels("counting").nth_equal, counting.nth_equal, *args, nth)


def test_displacements():
    cuts = torch.linspace(0.01, 0.05, NUM_MATRICES)
    kernel, operator = kernels("counting").count_displacements, displacement.count_displacements
    check(kernel, operator, make_values(), PLACES, make_masks(1), cuts)


def test_histograms_of_magnitudes():
    values = make_values()
    check(kernels("counting").largest_patterns, lamp.largest_patterns, values, PLACES, NUM_MATRICES)
    tops = lamp.largest_patterns(values, PLACES, NUM_MATRICES) >> 17
    lowest = (tops.long() - 2047).clamp(min=0)
    kernel = kernels("counting").count_magnitudes
    check(kernel, lamp.count_magnitudes, values, PLACES, lowest, 2, 6)


def test_masks():
    until = torch.tensor([0, 1 << 62, 9, 0, 30, 0, 4000, 1 << 62, 3, 11, 0])
    for magnitude in (0.0, 0.03125, 0.05):
        args = make_values(), PLACES, cuts_of(magnitude), until
        check(kernels("masks").keep_above, masks.keep_above, *args)
    check(kernels("masks").zero_pruned_, masks.zero_pruned_, make_values(), make_masks(1))
    firsts = [0, 35, 172, 10_003, 80_004]
    args = make_masks(1), make_masks(2), NUMELS, firsts
    check(kernels("masks").compare_masks, masks.compare_masks, *args)
