"""Pruning under ZeRO on the device beside one plain process on the CPU, at the tolerance of the tests."""

import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu.figures import Figure
from tests.mgpp import odd_transformer as odd
from tests.mgpp.backends import zero_worker
from tests.mgpp.backends.checks import (
    check_is_near_reference,
    check_sparsity_is_exact_and_the_ranks_agree,
)


def measure(size: Mapping[str, Any], device: torch.device, folder: Path) -> Iterator[Figure]:
    """Train the odd transformer in each layout on one rank."""
    zero_worker.start("nccl" if device.type == "cuda" else "gloo")
    reference = odd.reference(world_size=1)
    for case in size["cases"]:
        stage, precision, zero = odd.CASES[case]
        problem = ""
        try:
            result = zero_worker.train(stage, precision, **zero)
            assert len(result["hashes"]) == odd.SCHEDULE.num_steps  # type: ignore[arg-type]
            check_sparsity_is_exact_and_the_ranks_agree([result], reference)
            check_is_near_reference(result, reference)
        except Exception:  # noqa: BLE001  (reported as this case's)
            problem = traceback.format_exc()
        yield Figure(
            key=f"layout_{case}",
            text="exactly as many zeros as asked, weights near those of one process in float32",
            value=not problem,
            detail=problem,
        )
