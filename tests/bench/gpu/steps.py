"""What pruning adds to the steps of a fine-tune under ZeRO 2 in bf16: time and memory."""

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.training.deepspeed import init_deepspeed
from tests.bench.gpu.figures import Figure
from tests.bench.gpu.process import start_group
from tests.bench.step import INTERVAL, attach_pruner, make_engine, overhead, train


def measure(size: Mapping[str, Any], device: torch.device, folder: Path) -> Iterator[Figure]:
    """Take steps of a random model in turn, plain and pruned, every tenth with a pruning."""
    start_group(device.type)
    init_deepspeed("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    name = size["model"]
    memory = _Memory(device)
    shape = size["rows"], size["length"]
    plain, _ = make_engine(_random_model(size, device), shape[0], "bf16")
    train(plain, INTERVAL, *shape)
    held_by_plain = memory.held()
    pruned, names = make_engine(_random_model(size, device), shape[0], "bf16")
    attach_pruner(pruned, names)
    train(pruned, INTERVAL, *shape)  # the next step prunes, and every tenth from there
    held_by_pruned = memory.held() - held_by_plain
    turns = range(size["rounds"] * INTERVAL)
    figures = overhead([(*train(plain, 1, *shape), *train(pruned, 1, *shape)) for _ in turns])
    yield Figure(
        key=f"step_overhead_{name}",
        text="step time over plain fine-tuning, pruning every tenth step",
        value=figures["step_overhead"],
        limit="<= 1.03",
        of_device=True,
    )
    for kind, ratio in figures["step_ratios"].items():
        yield Figure(
            key=f"step_ratio_{name}_{kind.replace(' ', '_')}",
            text=f"the same of steps with {kind}",
            value=ratio,
            of_device=True,
        )
    yield Figure(
        key=f"plain_step_seconds_{name}",
        text="step time of plain fine-tuning",
        value=figures["plain_step_seconds"],
        of_device=True,
    )
    # Both are in memory all the while: what the other holds is no part of a step's own peak.
    of_plain = memory.peak(lambda: train(plain, INTERVAL, *shape)) - held_by_pruned
    of_pruned = memory.peak(lambda: train(pruned, INTERVAL, *shape)) - held_by_plain
    yield Figure(
        key=f"peak_memory_ratio_{name}",
        text="peak memory over plain fine-tuning",
        value=of_pruned / of_plain if device.type == "cuda" else None,
        limit="<= 1.05",
    )


def _random_model(size: Mapping[str, Any], device: torch.device) -> Any:
    kind = getattr(transformers, size["kind"])
    with device:  # a billion weights are drawn in a moment there
        return kind(kind.config_class(**size["settings"])).to(torch.bfloat16)


class _Memory:
    """Bytes of tensors on a GPU; of none on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def held(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self._on_gpu else 0

    def peak(self, work: Callable[[], object]) -> int:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() if self._on_gpu else 0
