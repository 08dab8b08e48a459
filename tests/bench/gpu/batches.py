"""Batches for the device: made by processes beside its worker, in pinned memory, and the same ones."""

import multiprocessing
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.training.batches import BatchPlan, loaded, num_loaders
from tests.bench.gpu.figures import Figure


def measure(size: Mapping[str, Any], device: torch.device, folder: Path) -> Iterator[Figure]:
    """Load an epoch for the device, and the same for a CPU."""
    shape = size["rows"], size["length"]
    tokens = torch.randint(size["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row} for row in tokens.tolist()]
    task = make_task(CausalLMConfig(type="causal-lm", max_length=size["length"]))
    plan = BatchPlan(
        num_rows=len(rows),
        batch_size=size["batch"],
        micro_batch_size=size["batch"],
        world_size=1,
        seed=0,
    )

    def batches(where: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        made = loaded(rows, plan.micro_batches(0, 0), task.collator(None), where)
        return islice(made, plan.steps_per_epoch)

    expected = list(batches(torch.device("cpu")))
    seconds, found = [], []
    begin = perf_counter()
    on_the_way = batches(device)
    for batch in on_the_way:
        seconds.append(perf_counter() - begin)
        found.append(batch)
        loaders = len(multiprocessing.active_children())
        begin = perf_counter()
    same = len(found) == len(expected) and all(
        torch.equal(ours[name], theirs[name])
        for ours, theirs in zip(found, expected, strict=True)
        for name in theirs
    )
    on_gpu = device.type == "cuda"
    pinned = all(tensor.is_pinned() for batch in found for tensor in batch.values())
    yield Figure(key="batches_same", text="batches are those of a CPU run", value=same)
    yield Figure(
        key="batches_pinned",
        text="batches lie in pinned memory",
        value=pinned if on_gpu else None,
    )
    yield Figure(
        key="loader_processes",
        text="processes that make batches, beside the worker",
        value=float(loaders),
        limit=f">= {min(num_loaders(), 1)}",
        of_device=True,
    )
    yield Figure(
        key="batch_seconds",
        text="wait for a batch where nothing else is done",
        value=median(seconds[1:]),
        of_device=True,
    )
