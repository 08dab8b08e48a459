"""The exact threshold over 85M float32 weights against `torch.kthvalue` on the joined magnitudes."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mgpp import Collectives, Shard
from mgpp.masking.threshold import Group, find_cuts
from tests.mgpp.ranks import stacks_of

NUM_MATRICES, SHAPE, SPARSITY, ROUNDS = 36, (768, 3072), 0.9, 9


def make_shards() -> list[Shard]:
    """Return the matrices of BERT-base's size, normal as trained weights about are."""
    generator = torch.Generator().manual_seed(0)
    shards = []
    for index in range(NUM_MATRICES):
        weight = torch.randn(SHAPE, generator=generator).mul_(0.04)
        shards.append(
            Shard(
                name=f"layer.{index}.weight",
                index=index,
                full_shape=SHAPE,
                offset=0,
                numel=weight.numel(),
                flat=weight,
                start=0,
            )
        )
    return shards


def peak_bytes() -> int:
    """Return the most memory this process held since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def reset_peak() -> None:
    """Begin a new peak at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main(out: str) -> None:
    """Measure A B A B and write the medians."""
    shards = make_shards()
    k = int(sum(shard.numel for shard in shards) * SPARSITY)
    numels = [shard.numel for shard in shards]
    stacks, group = stacks_of(shards, len(shards)), Group(indices=tuple(range(len(shards))), k=k)
    sent: list[int] = []

    def all_reduce(tensor: Tensor) -> None:
        sent.append(tensor.numel() * tensor.element_size())

    def ours() -> float:
        sent.clear()
        return find_cuts(stacks, [group], numels, Collectives(0, 1, all_reduce))[0].threshold

    def theirs() -> float:
        joined = torch.cat([shard.weight for shard in shards]).abs_()
        return float(joined.kthvalue(k).values)

    def read() -> None:
        for shard in shards:
            shard.weight.sum()

    reset_peak()
    before = peak_bytes()
    found = ours()  # the first call: nothing freed before can hide what it takes
    extra = peak_bytes() - before
    assert found == theirs()
    rounds = [(seconds(theirs), seconds(ours), seconds(read)) for _ in range(ROUNDS)]
    Path(out).write_text(
        json.dumps(
            {
                "threshold_speedup": statistics.median(a / b for a, b, _ in rounds),
                "threshold_reads": statistics.median(b / c for _, b, c in rounds),
                "threshold_extra_mib": extra / 2**20,
                "threshold_sent_bytes": sum(sent),
                "threshold_seconds": statistics.median(b for _, b, _ in rounds),
                "kthvalue_seconds": statistics.median(a for a, _, _ in rounds),
                "threshold_num_threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
