"""A pruning's time in reads of the weights, and how often it waits for the device."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mgpp import MGPP, Collectives, Pruner, PruningSchedule, Shard
from tests.bench.gpu.figures import Figure
from tests.bench.gpu.process import as_on_a_gpu, timed
from tests.mgpp.operations import counted

# What 3% of ten steps of 100 ms leave for one pruning, over one read of 4 GB at 3.35 TB/s.
MOST_READS = "<= 25"
MOST_SYNCHRONIZING = "<= 12"
MOST_HELD = "<= 0.2"


def measure(size: Mapping[str, Any], device: torch.device, folder: Path) -> Iterator[Figure]:
    """Prune random weights of some sizes by MGPP, over and over from the same weights."""
    with as_on_a_gpu(device.type):
        for name, (number, *shape) in size["weights"].items():
            yield from _of_one_size(name, number, tuple(shape), size["rounds"], device)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _of_one_size(
    name: str, number: int, shape: tuple[int, ...], rounds: int, device: torch.device
) -> Iterator[Figure]:
    torch.manual_seed(0)
    numel = shape[0] * shape[1]
    flat = torch.randn(number * numel, device=device).mul_(0.04)
    flat.grad = torch.zeros_like(flat)
    held = _allocated(device)
    pruner = make_pruner(flat, number, shape, rounds)
    yield Figure(
        key=f"pruner_bytes_per_weight_{name}",
        text="bytes the pruner holds per weight",
        value=None if held is None else (_allocated(device) - held) / flat.numel(),
        limit=MOST_HELD,
    )
    start = flat.clone()
    read = median(timed(flat.sum, device.type) for _ in range(rounds))
    prior = median(
        timed(lambda: pruner.before_update(pruner.shards), device.type) for _ in range(rounds)
    )
    seconds = []
    for _ in range(rounds):
        flat.copy_(start)
        seconds.append(timed(pruner.finish_step, device.type))
    flat.copy_(start)
    waits = synchronizing(pruner.finish_step, device.type)
    while pruner.step <= pruner.schedule.prune_end:
        flat.copy_(start)
        pruner.finish_step()
    fixed = median(
        timed(lambda: pruner.after_update(pruner.shards), device.type) for _ in range(rounds)
    )
    yield Figure(
        key=f"read_seconds_{name}", text="one read of the weights", value=read, of_device=True
    )
    yield Figure(
        key=f"pruning_reads_{name}",
        text="time of a pruning over one read of the weights",
        value=median(seconds) / read,
        limit=MOST_READS,
        of_device=True,
    )
    yield Figure(
        key=f"pruning_synchronizing_{name}",
        text="calls of a pruning that wait for the device",
        value=waits,
        limit=MOST_SYNCHRONIZING,
    )
    for key, text, value in (
        ("prior", "time of the prior's gradient", prior),
        ("fixed_mask", "time of a step under a fixed mask", fixed),
    ):
        yield Figure(
            key=f"{key}_reads_{name}",
            text=f"{text} over one read of the weights",
            value=value / read,
            of_device=True,
        )


def make_pruner(flat: torch.Tensor, number: int, shape: tuple[int, ...], rounds: int) -> Pruner:
    """Return a pruner of so many matrices that lie one after another, as under ZeRO 1 and 2."""
    numel = flat.numel() // number
    shards = [
        Shard(
            name=f"layers.{index}.weight",
            index=index,
            full_shape=shape,
            offset=0,
            numel=numel,
            flat=flat,
            start=index * numel,
        )
        for index in range(number)
    ]
    return Pruner(
        shards,
        {shard.name: shape for shard in shards},
        method=MGPP(num_examples=5000),
        schedule=PruningSchedule(
            num_steps=rounds + 4,
            warmup_steps=0,
            finetune_steps=1,
            interval=1,
            initial_sparsity=0.85,
            final_sparsity=0.9,
        ),
        collectives=Collectives(device=flat.device),
    )


def synchronizing(work: Callable[[], object], device: str) -> int:
    """Count the calls that wait for the device; on a CPU those that would."""
    if device != "cuda":
        with counted() as counts:
            work()
        return counts.synchronizing.total()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _allocated(device: torch.device) -> Any:
    return torch.cuda.memory_allocated() if device.type == "cuda" else None
