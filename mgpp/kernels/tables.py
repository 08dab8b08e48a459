"""One launch over many tensors: their addresses, and the block of them that each program has."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Return the addresses of tensors of a GPU, on that GPU, without waiting for it: int64."""
    return _moved([tensor.data_ptr() for tensor in tensors], tensors[0].device)


def blocks_of(values: Sequence[Tensor], places: Sequence[int], size: int) -> Tensor:
    """Divide ranges of stacks among programs, each of which has elements of one matrix.

    Args:
        values: as in `mgpp.sharding.stacks.Stacks`.
        places: likewise.
        size: the most elements of a block.

    Returns:
        int64 [blocks, 4] on the device of the values: which of them, first element, end, matrix.
    """
    numels = tuple(len(value) for value in values)
    return _blocks(numels, tuple(places), size, values[0].device)


def whole_blocks(numels: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Return the same of whole tensors: their blocks begin at multiples of the size."""
    places = tuple(n for i, numel in enumerate(numels) for n in (i, 0, max(numel, 1)))
    return _blocks(tuple(numels), places, size, device)


def launch(kernel: Any, blocks: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel of Triton on the blocks' GPU, a program for each block; without blocks do nothing."""
    if len(blocks):
        with torch.cuda.device_of(blocks):
            kernel[(len(blocks),)](blocks, *arguments, **constants)


@lru_cache(maxsize=64)
def _blocks(
    numels: tuple[int, ...], places: tuple[int, ...], size: int, device: torch.device
) -> Tensor:
    rows = []
    stacks = zip(numels, places[::3], places[1::3], places[2::3], strict=True)
    for which, (numel, first, offset, elements) in enumerate(stacks):
        for number in range(offset // elements, -(-(offset + numel) // elements)):
            begin = max(number * elements - offset, 0)
            end = min((number + 1) * elements - offset, numel)
            rows += [
                (which, at, min(at + size, end), first + number) for at in range(begin, end, size)
            ]
    return _moved(rows, device).view(-1, 4)


def _moved(numbers: Sequence[object], device: torch.device) -> Tensor:
    held = torch.tensor(numbers, dtype=torch.int64)
    if device.type == "cuda":
        held = held.pin_memory()
    return held.to(device, non_blocking=True)
