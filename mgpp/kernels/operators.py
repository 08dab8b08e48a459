"""Operators of torch: plain torch for CPUs, a kernel for GPUs, and what the result looks like."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def operator(
    kernels: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the operator `mgpp::<its name>`: one operation, however many tensors it is given.

    Args:
        kernels: the module of `mgpp.kernels`, imported on GPUs alone, that has the function for CUDA.
        fake: returns what has the result's shape, dtype and device.
        mutates: arguments that are changed in place.
    """

    def decorate(on_cpu: Callable[P, R]) -> Callable[P, R]:
        name = on_cpu.__name__

        def on_cuda(*args: Any) -> Any:
            return getattr(import_module(f"mgpp.kernels.{kernels}"), name)(*args)

        made = torch.library.custom_op(
            f"mgpp::{name}", on_cpu, mutates_args=mutates, device_types="cpu"
        )
        made.register_kernel("cuda")(on_cuda)
        made.register_fake(fake)
        return made

    return decorate
