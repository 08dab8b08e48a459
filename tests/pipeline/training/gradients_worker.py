"""Run on ranks: the gradients that the optimizer is given, against the exact means; timeouts of groups.

One launch holds worlds of several sizes, which go through the same cases side by side.
"""

import json
import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgpp.backends.deepspeed import clear_gradients
from mgpp.backends.deepspeed.layout import parameter_shards
from pipeline.training.deepspeed import (
    ZeroConfig,
    deepspeed_config,
    init_deepspeed,
    widen_gradients,
)
from pipeline.worker_group import set_collective_timeout
from tests.cases import run_cases

SLOW_IMPORTS = ("deepspeed.runtime.zero.muon.muon_optimizer",)  # before the ranks are forked
WORLDS = (2, 3, 4)  # sizes; of three, a mean's division rounds
ACCUMULATION, BUCKET = 4, 3000
SHAPES = ((37, 53), (101,), (97, 41), (64, 33), (5, 7))  # one is larger than a bucket
NUMEL = sum(rows * columns for rows, columns in (*(s for s in SHAPES if len(s) == 2), (101, 1)))
TIMEOUT = 77  # seconds; no default of anyone's
_AWAY = {"offload_optimizer": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage1-offload": {"stage": 1, **_AWAY},
    "stage2": {"stage": 2},
    "stage2-offload": {"stage": 2, **_AWAY},
    "stage3": {"stage": 3},
    "stage3-offload": {"stage": 3, **_AWAY},
    "stage3-offload-all": {"stage": 3, **_AWAY, "offload_parameters": True},
}
CASES: dict[str, dict[str, Any]] = {
    f"{layout}-{precision}-{gradients}": {**zero, "precision": precision, "gradients": gradients}
    for layout, zero in LAYOUTS.items()
    for precision in ("bf16", "fp16")
    for gradients in ("fp32", precision)
    if (zero["stage"], precision) != (0, "fp16")  # which is refused
}


class Sums(nn.Module):
    """A model whose gradients are its inputs; a weight without one takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in SHAPES)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, *inputs: Tensor) -> Tensor:
        products = zip(self.weights, inputs, strict=False)
        return torch.stack([(weight.float() * x).sum() for weight, x in products]).sum()


def make_engine(zero: ZeroConfig) -> Any:
    settings = deepspeed_config(
        zero,
        micro_batch_size=1,
        accumulation=ACCUMULATION,
        gradient_clipping=None,
        on_gpu=False,
    )
    model = Sums().to(zero.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    widen_gradients(zero, engine.module)
    return engine


def inputs_of(rank: int, micro: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * micro + rank)
    return [torch.randn(shape, generator=generator).to(dtype).float() for shape in SHAPES]


def measure(case: str, folder: Path) -> None:
    """Write this rank's largest error of a gradient, in units of the exact ones' standard deviation."""
    extra = {"fp16": {"initial_scale_power": 3}} if "fp16" in case else {}
    zero = ZeroConfig(**{"precision": "fp32", **CASES[case]}, bucket_elements=BUCKET, extra=extra)
    engine, dtype = make_engine(zero), zero.dtype
    names = {id(parameter): i for i, parameter in enumerate(engine.module.weights)}
    found: dict[tuple[int, int], Tensor] = {}

    def collect(*_: Any) -> None:
        for shard in parameter_shards(engine):
            given = shard.flat.grad
            if id(shard.parameter) in names and given is not None and shard.numel:
                assert given.dtype == torch.float32
                found[names[id(shard.parameter)], shard.offset] = shard.part_of(given).clone()

    engine.basic_optimizer.register_step_pre_hook(collect)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    typical = (world_size * ACCUMULATION) ** -0.5  # a mean of so many normal numbers
    largest = 0.0
    for first, used in ((0, len(SHAPES)), (ACCUMULATION, len(SHAPES) - 1)):
        found.clear()
        clear_gradients(engine)
        for micro in range(first, first + ACCUMULATION):
            engine.backward(engine(*inputs_of(rank, micro, dtype)[:used]))
            engine.step()
        every = [
            inputs_of(other, micro, dtype)
            for other in range(world_size)
            for micro in range(first, first + ACCUMULATION)
        ]
        for (weight, offset), gradient in found.items():
            mean = torch.stack([inputs[weight].double() for inputs in every]).mean(0).view(-1)
            # Nothing of the first step is left for the weight that takes no part in the second.
            exact = (mean if weight < used else 0 * mean)[offset : offset + gradient.numel()]
            error = (gradient.double() - exact).abs().max() / typical
            largest = max(largest, float(error))
    numel = sum(gradient.numel() for gradient in found.values())
    result = {"error": largest, "numel": numel}
    (folder / f"{case}-{world_size}-{rank}.json").write_text(json.dumps(result))
    engine.destroy()


def read_timeouts(folder: Path) -> None:
    """Write the timeouts of all process groups that exist after engines of all kinds were made."""
    size = dist.get_world_size()
    kinds: list[dict[str, Any]] = [{"stage": stage} for stage in (0, 1, 2, 3)]
    if size % 2 == 0:
        inner = {"zero_hpz_partition_size": 2}
        kinds.append({"stage": 3, "extra": {"zero_optimization": inner}})
    for zero in kinds:
        make_engine(ZeroConfig(**zero, precision="bf16", bucket_elements=BUCKET)).destroy()
    torch.distributed.device_mesh.init_device_mesh("cpu", (size, 1))
    found = {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group, name in dist.distributed_c10d._world.pg_names.items()
    }
    (folder / f"timeouts-{size}-{dist.get_rank()}.json").write_text(json.dumps(found))


def main(folder: str) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda _: True  # slow on most CPUs, but it computes
    join_world(Path(folder))
    set_collective_timeout(TIMEOUT)
    init_deepspeed("gloo")
    cases = {case: partial(measure, case, Path(folder)) for case in CASES}
    run_cases(Path(folder), {**cases, "timeouts": partial(read_timeouts, Path(folder))}, seconds=60)


def join_world(folder: Path) -> None:
    """Join this rank's world: the first ranks of the launch are the first world's, and so on."""
    rank = int(os.environ["RANK"])
    launch = os.environ["MASTER_PORT"]  # a launch after a failed case makes worlds of its own
    for size in WORLDS:
        if rank < size:
            break
        rank -= size
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/world-{size}-{launch}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
