"""Fingerprints of weights, to compare what was trained with what loads."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

WEIGHTS_FILE = "weights.json"


class Fingerprint:
    """The fingerprint of a tensor, of which parts come one after the other.

    Args:
        count_zeros: whether zeros are counted, as of prunable weights.
    """

    def __init__(self, *, count_zeros: bool) -> None:
        self._count_zeros = count_zeros
        self._digest = hashlib.sha256()
        self._zeros = 0

    def update(self, values: Tensor) -> None:
        """Take the next values in row-major order, with no negative zeros."""
        flat = values.contiguous().view(-1)
        self._digest.update(flat.view(torch.uint8).numpy().data)
        if self._count_zeros:
            self._zeros += int((flat == 0).sum())

    def entry(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
        """Return shape, dtype, sha256 and (if counted) zeros."""
        found: dict[str, Any] = {
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": self._digest.hexdigest(),
        }
        return found | {"zeros": self._zeros} if self._count_zeros else found


def positive_zeros(tensor: Tensor) -> Tensor:
    """Return the tensor with every -0.0 as 0.0; other values are untouched."""
    return tensor + 0 if tensor.is_floating_point() else tensor


def fingerprints(named: Iterable[tuple[str, Tensor]], prunable: Iterable[str]) -> dict[str, Any]:
    """Return shape, dtype, sha256 and (for prunable weights) zeros of each tensor, -0.0 as 0.0."""
    counted = set(prunable)
    found: dict[str, Any] = {}
    for name, tensor in named:
        fingerprint = Fingerprint(count_zeros=name in counted)
        fingerprint.update(positive_zeros(tensor.detach().cpu()))
        found[name] = fingerprint.entry(tensor.shape, tensor.dtype)
    return found
