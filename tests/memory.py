"""What tensors are alive in this process, and what a piece of work takes."""

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def held_bytes() -> dict[int, int]:
    """Return the bytes of every storage that a tensor alive lies in, by its address."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return storages


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made meanwhile and are alive; those of fake tensors, too.

    Attributes:
        peak: most of them at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._add(given, counts=False)  # it was there before, or is known
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            self._add(made, counts=True)
        return result

    def _add(self, thing: Any, *, counts: bool) -> None:
        if not isinstance(thing, torch.Tensor):
            return
        storage = thing.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = size = storage.nbytes() if counts else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._seen.pop(key)
