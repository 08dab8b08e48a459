"""What a pruning asks of a GPU: operations and synchronizing calls, counted as its chunks make them.

The shards are CPU tensors, worked on as those of a GPU are. Views and bare allocations launch nothing and
are not counted. A pruning may take FIXED operations and PER_GIGABYTE of shard; neither may depend on the
number of shards.
"""

import pytest
import torch
from torch import nn

from mgpp import GMP, MGPP, Collectives, Movement, Placement, Pruner, PruningSchedule
from mgpp.backends.torch import attach
from mgpp.kernels import devices
from mgpp.masking import lamp
from tests.mgpp.operations import counted, uncounted
from tests.mgpp.ranks import contiguous_shards, per_weight_shards

FIXED, PER_GIGABYTE, MOST_SYNCHRONIZING = 60, 60, 12
SCHEDULE = PruningSchedule(
    num_steps=4,
    warmup_steps=0,
    finetune_steps=1,
    interval=1,
    initial_sparsity=0.5,
    final_sparsity=0.9,
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Take kernels to be there, and with them the way values are counted."""
    monkeypatch.setattr(devices, "has_kernels", lambda device: True)


def make_weights(num, shape, tied=False):
    generator = torch.Generator().manual_seed(num)
    if tied:
        return [torch.randint(-3, 4, shape, generator=generator) / 8 for _ in range(num)]
    return [torch.randn(shape, generator=generator) * 0.04 for _ in range(num)]


def make_pruner(weights, cut_into=contiguous_shards, method=None, collectives=None, **placement):
    shapes = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}
    return Pruner(
        cut_into(weights, 0, 1),
        shapes,
        method=method or MGPP(num_examples=100),
        schedule=SCHEDULE,
        collectives=collectives,
        placement=Placement(**placement),
    )


def second_pruning(pruner):
    """Count a pruning that comes after another one, and so has all its parts."""
    pruner.finish_step()
    with counted() as counts:
        pruner.finish_step()
    assert pruner.last_pruning.moved_median is not None or not pruner.method.prunes_by_magnitude()
    return counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut_into", [contiguous_shards, per_weight_shards])
def test_a_pruning_is_few_operations_and_waits_few_times(cut_into, tied):
    few = second_pruning(make_pruner(make_weights(4, (512, 1024), tied), cut_into))
    many = second_pruning(make_pruner(make_weights(96, (256, 512), tied), cut_into))
    assert many.operations == few.operations, "they depend on the number of shards"
    assert many.synchronizing == few.synchronizing
    assert many.operations.total() <= FIXED, many.operations
    assert many.synchronizing.total() <= MOST_SYNCHRONIZING, many.synchronizing


def test_a_pruning_s_operations_grow_with_its_chunks_alone(monkeypatch):
    """Chunks of a GPU are 2^26 elements: smaller ones here stand for larger shards."""
    assert devices.chunk_size(torch.device("cuda")) == 1 << 26
    weights = make_weights(8, (512, 1024))
    one = second_pruning(make_pruner(weights))
    monkeypatch.setattr(devices, "_ON_GPU", 1 << 20)
    four = second_pruning(make_pruner(weights))  # 4 chunks: as of a gigabyte, 2^28 bytes each
    added = four.operations.total() - one.operations.total()
    assert added <= PER_GIGABYTE, four.operations
    assert four.synchronizing == one.synchronizing


@pytest.mark.parametrize("method", [GMP, MGPP, Movement])
def test_a_step_under_a_fixed_mask_is_one_operation_a_parameter_group(method):
    pruner = make_pruner(make_weights(24, (64, 128)), method=method())
    while pruner.step <= SCHEDULE.prune_end:
        pruner.finish_step()
    with counted() as counts:
        pruner.before_update(pruner.shards)
        pruner.after_update(pruner.shards)
        pruner.finish_step()
    assert dict(counts.operations) == {"zero_pruned_": 1}
    assert not counts.synchronizing


def test_a_torch_optimizer_s_hooks_are_as_few():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(12)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    prunable = dict(model.named_parameters())
    pruner = attach(optimizer, prunable, method=GMP(), schedule=SCHEDULE)
    while pruner.step <= SCHEDULE.prune_end:
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    with counted() as counts:
        optimizer.step()
    assert counts.operations["zero_pruned_"] == 1
    with counted() as plain:
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert counts.operations - plain.operations == {"zero_pruned_": 1}


@pytest.mark.parametrize(
    ("scope", "num", "num_batches"),
    [("uniform", 1200, 2), ("lamp", 600, 3)],  # of 1,023 cuts, of 512 histograms
)
def test_thousands_of_experts_are_searched_in_batches(monkeypatch, scope, num, num_batches):
    """The limits hold for each batch, which sends 16 MiB at most."""
    weights = [torch.randn(num // 2, 4, 8) * 0.04 for _ in range(2)]
    sent = []

    def all_reduce(tensor):
        sent.append(tensor.numel() * tensor.element_size())

    monkeypatch.setattr(lamp, "lamp_counts", uncounted(lamp.lamp_counts))  # is of the host
    collectives = Collectives(0, 1, all_reduce)
    counts = second_pruning(make_pruner(weights, collectives=collectives, scope=scope))
    assert max(sent) <= 16 << 20
    assert counts.operations.total() <= num_batches * FIXED, counts.operations
    assert counts.synchronizing.total() <= num_batches * MOST_SYNCHRONIZING, counts.synchronizing
