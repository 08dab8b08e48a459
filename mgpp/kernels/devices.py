"""What differs between devices: how much is worked on at a time, and what is waited for.

On a CPU a chunk and its buffers stay in cache, and every thread has a part of it: torch divides work
among threads in parts of 2^15 elements at least. On a GPU what costs is the number of operations, and a
chunk only bounds the memory that buffers take.
"""

import torch
from torch import Tensor

_PER_THREAD = 1 << 17  # 512 KiB of float32
_ON_GPU = 1 << 26  # 256 MiB of float32


def has_kernels(device: torch.device) -> bool:
    """Tell whether counts and masks are made by kernels that read each value once: on GPUs."""
    return device.type == "cuda"


def chunk_size(device: torch.device) -> int:
    """Return how many elements to work on at a time; a multiple of 8, to cut packed masks along."""
    if has_kernels(device):
        return _ON_GPU
    return torch.get_num_threads() * _PER_THREAD


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; only what comes from a GPU is waited for."""
    return tensor.to(device, non_blocking=has_kernels(device))


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a 1-D tensor in order, as views of at most a chunk."""
    parts: tuple[Tensor, ...] = tensor.split(chunk_size(tensor.device))
    return parts


def bit_chunks(packed: Tensor) -> tuple[Tensor, ...]:
    """Return packed bits, 1-D uint8, as views that belong to the chunks of what they are bits of."""
    parts: tuple[Tensor, ...] = packed.split(chunk_size(packed.device) // 8)
    return parts
