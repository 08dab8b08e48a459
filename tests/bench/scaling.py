"""What one rank touches and sends at 1, 2 and 4 ranks: counted, not timed."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgpp import MGPP, Collectives, Pruner, PruningSchedule, Shard
from tests.mgpp.ranks import contiguous_shards, run_ranks

SHAPES = [(512, 512)] * 8
SCHEDULE = PruningSchedule(
    num_steps=100,
    warmup_steps=0,
    finetune_steps=10,
    interval=10,
    initial_sparsity=0.2,
    final_sparsity=0.9,
)


def count(world_size: int) -> dict[str, Any]:
    """Prune once on `world_size` ranks; return what the busiest rank did."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    shapes = {f"layers.{i}.weight": tuple(w.shape) for i, w in enumerate(weights)}

    def work(collectives: Collectives) -> tuple[int, int]:
        shards: list[Shard] = contiguous_shards(weights, collectives.rank, world_size)
        sent: list[int] = []

        def all_reduce(tensor: Tensor) -> None:
            sent.append(tensor.numel() * tensor.element_size())
            collectives.all_reduce(tensor)

        counting = Collectives(collectives.rank, world_size, all_reduce)
        method = MGPP(num_examples=1000)
        pruner = Pruner(shards, shapes, method=method, schedule=SCHEDULE, collectives=counting)
        sent.clear()
        pruner.finish_step()
        return sum(shard.numel for shard in shards), sum(sent)

    elements, sent = zip(*run_ranks(world_size, work), strict=True)
    return {"elements": max(elements), "sent_bytes": max(sent)}


def main(out: str) -> None:
    """Count and write."""
    total = sum(a * b for a, b in SHAPES)
    ranks = {world_size: count(world_size) for world_size in (1, 2, 4)}
    worst = max(found["elements"] * n / total for n, found in ranks.items())
    Path(out).write_text(json.dumps({"scaling_elements": worst, "scaling": ranks}))


if __name__ == "__main__":
    main(*sys.argv[1:])
