"""Operations and synchronizing calls of a piece of work: what a GPU would launch, and wait for."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

# The size of their results depends on values, so that CUDA's own implementations wait for the device.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2"}
_TRANSFERS = {"tolist", "cpu", "numpy"}


@dataclass
class Counts:
    """Operations by name, views and bare allocations left out, and those calls that synchronize."""

    operations: Counter[str] = field(default_factory=Counter)
    synchronizing: Counter[str] = field(default_factory=Counter)


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view and not name.startswith("empty"):
            self.counts.operations[name] += 1
        indices = args[1] if name == "index" else []
        if name in _WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.counts.synchronizing[name] += 1
        return func(*args, **(kwargs or {}))


class _Transfers(TorchFunctionMode):
    """Copies to the host, which on a tensor of the CPU are no operation: counted as they are called."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        waits = name == "to" and not (kwargs or {}).get("non_blocking")
        if name in _TRANSFERS or (waits and any(isinstance(a, torch.device) for a in args[1:])):
            self.counts.synchronizing[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what is done inside."""
    counts = Counts()
    with _Operations(counts), _Transfers(counts):
        yield counts


def uncounted(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function whose operations are not counted."""

    @wraps(function)
    def quietly(*args: P.args, **kwargs: P.kwargs) -> R:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return quietly
