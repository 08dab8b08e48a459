"""Tokens a second of the dense stage, or of `transformers.Trainer` with DeepSpeed, in bf16."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu.figures import Figure
from tests.bench.gpu.process import start_group
from tests.bench.throughput import MODES, Size, write_model


def measure(size: Mapping[str, Any], device: torch.device, folder: Path) -> Iterator[Figure]:
    """Train a random GPT-2 in one of the two ways."""
    size = dict(size)
    mode, turn = size.pop("mode"), size.pop("turn")
    start_group(device.type)
    write_model(folder, Size(**size))
    yield Figure(
        key=f"tokens_per_second_{mode}_{turn}",
        text={
            "ours": "tokens a second of the dense stage",
            "trainer": "tokens a second of transformers.Trainer",
        }[mode],
        value=MODES[mode](folder, Size(**size)),
        of_device=True,
    )
