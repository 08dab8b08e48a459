"""Operators of torch: plain torch for CPUs, a kernel for GPUs, and what the result looks like."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
# Not `torch.library.custom_op`: its first call imports torch's compiler, which takes a second.
_LIBRARY = torch.library.Library("mgpp", "DEF")


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

        _LIBRARY.define(name + torch.library.infer_schema(on_cpu, mutates_args=mutates))
        _LIBRARY.impl(name, on_cpu, "CPU")
        _LIBRARY.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"mgpp::{name}", fake, lib=_LIBRARY)
        made: Callable[P, R] = wraps(on_cpu)(getattr(torch.ops.mgpp, name))
        return made

    return decorate
