"""What holds of pruning under ZeRO beside one process, where rounding lets weights differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.mgpp import odd_transformer as odd

Reference = tuple[dict[str, Tensor], list[dict[str, Tensor]]]


def check_is_near_reference(result: Mapping[str, Any], reference: Reference) -> None:
    """Rounding moves weights by a few steps of the optimizer, not by more."""
    for name, expected in reference[0].items():
        found = result["weights"][name]
        assert (found - expected).abs().mean() < 3 * odd.ADAMW["lr"], name


def check_sparsity_is_exact_and_the_ranks_agree(
    results: Sequence[Mapping[str, Any]], reference: Reference
) -> None:
    """Exactly so many weights are zero as were to be, and every rank has the same ones."""
    _, masks = reference
    num_prunable = sum(keep.numel() for keep in masks[-1].values())
    k = int(num_prunable * 0.85)
    first = results[0]
    assert first["pruning"]["num_pruned"] == k
    assert first["zeros"] == k
    zeros = sum(int((first["weights"][name] == 0).sum()) for name in masks[-1])
    assert zeros == k
    for other in results[1:]:
        assert first["hashes"] == other["hashes"]
        assert first["pruning"] == other["pruning"]
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name])
