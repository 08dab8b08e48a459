"""Pinned host memory under offload: which blocks DeepSpeed pins, and what torch makes of their sizes.

torch's allocator of pinned memory rounds every block up to a power of two
(`torch.cuda.host_memory_stats`) and keeps what is freed; DeepSpeed 0.19 pins gradients, and at ZeRO 1
and 2 master weights, each group of parameters in one block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.planner.memory import MASTER, SUB_GROUP
from pipeline.training.deepspeed import ZeroConfig, deepspeed_config

_PERSISTENT = 10**5  # elements of a parameter that ZeRO 3 keeps whole on the device, by default


def pinned_blocks(
    zero: ZeroConfig,
    groups: Sequence[Sequence[int]],
    world_size: int,
    *,
    accumulated: bool,
    on_gpu: bool = True,
) -> list[int]:
    """Return the sizes of the blocks that a worker pins, in bytes as DeepSpeed asks for them.

    Args:
        zero: how state is sharded.
        groups: the optimizer's groups of parameters: elements of each that is trained.
        world_size: workers.
        accumulated: whether a step has several micro-batches.
        on_gpu: whether the workers have GPUs; without, only what `zero.extra` pins.
    """
    settings = deepspeed_config(
        zero, micro_batch_size=1, accumulation=1, gradient_clipping=None, on_gpu=on_gpu
    )["zero_optimization"]
    found: list[int] = []
    if zero.offload_optimizer and settings["offload_optimizer"].get("pin_memory", True):
        of_stage = _of_stage_3 if zero.stage == 3 else _of_stages_1_and_2
        found += of_stage(zero, groups, world_size, settings, accumulated)
    if zero.offload_parameters and settings["offload_param"].get("pin_memory", True):
        found += _of_parameters(zero, groups, world_size, settings)
    return [size for size in found if size]


def rounded_up(size: int) -> int:
    """Return what torch allocates for a pinned block: the next power of two, bytes."""
    return 1 << (size - 1).bit_length()


def rounding_bytes(blocks: Sequence[int]) -> int:
    """Return by how much more torch allocates for blocks than was asked for."""
    return sum(rounded_up(size) - size for size in blocks)


def _of_stage_3(
    zero: ZeroConfig,
    groups: Sequence[Sequence[int]],
    world_size: int,
    settings: dict[str, Any],
    accumulated: bool,
) -> Iterator[int]:
    """Yield all gradients in one block as they are summed, and in float32 one for each sub-group."""
    most = int(settings.get("sub_group_size", SUB_GROUP))
    parts = [[-(-numel // world_size) for numel in group] for group in groups]
    yield sum(map(sum, parts)) * zero.gradient_dtype.itemsize
    for group in parts:
        size = 0
        for part in group:
            size += part
            if size >= most and sum(group) > most:
                yield size * MASTER
                size = 0
        yield size * MASTER


def _of_stages_1_and_2(
    zero: ZeroConfig,
    groups: Sequence[Sequence[int]],
    world_size: int,
    settings: dict[str, Any],
    accumulated: bool,
) -> Iterator[int]:
    """Yield of each group the master weights, their copy in 16 bits and the gradients; then buffers."""
    width = zero.dtype.itemsize
    for group in groups:
        part = -(-sum(group) // world_size)
        yield from (part * MASTER, part * width, part * MASTER)
    yield max(map(max, groups)) * width
    if zero.stage == 2 and accumulated and not zero.widens_gradients:
        # Those of a micro-batch, each parameter's whole where a worker has a part of it.
        for group in groups:
            end, begin = -(-sum(group) // world_size), 0
            for numel in group:
                if begin < end:  # the first worker's part
                    yield numel * width
                begin += numel


def _of_parameters(
    zero: ZeroConfig,
    groups: Sequence[Sequence[int]],
    world_size: int,
    settings: dict[str, Any],
) -> Iterator[int]:
    """Yield each parameter's part, pinned as it is loaded and kept by torch, and each group's block."""
    if zero.nvme_path:
        return
    width = zero.dtype.itemsize
    least = int(settings.get("stage3_param_persistence_threshold", _PERSISTENT))
    for group in groups:
        parts = [-(-numel // world_size) * width for numel in group]
        yield from (part for part, numel in zip(parts, group, strict=True) if numel > least)
        yield sum(parts)
