"""Run on ranks: what two workers really hold at the optimizer's step, and write, in every layout."""

import gc
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist

from pipeline.context import Context
from pipeline.models.loading import ModelConfig
from pipeline.pruning.config import PruneSection
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.sequence import ClassificationConfig
from pipeline.training.checkpoint import TrainingState, write_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig, init_deepspeed
from pipeline.training.engine import make_engine
from pipeline.training.loop import attach_pruner
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases
from tests.memory import held_bytes

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked
CASES: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage1-bf16": {"stage": 1, "precision": "bf16"},
    "stage2-bf16": {"stage": 2, "precision": "bf16"},
    "stage3-bf16": {"stage": 3, "precision": "bf16"},
    "stage2-offload": {"stage": 2, "offload_optimizer": True},
    "stage3-offload": {"stage": 3, "offload_optimizer": True},
}
BUCKET = 2000


def measure(case: str, bert: str, folder: Path) -> dict[str, int]:
    """Return what one worker holds at the end of the inner optimizer's second step, and all write."""
    gc.collect()
    before = set(held_bytes())
    zero = ZeroConfig(**{"precision": "fp32", **CASES[case]}, bucket_elements=BUCKET)
    config = TrainConfig(batch_size=4, micro_batch_size=2)
    plan = config.batch_plan(num_rows=8, world_size=2)
    prune = PruneSection(sparsity=0.5)
    task = make_task(ClassificationConfig(type="classification", text=["text"], label="label"))
    model = ModelConfig(path=bert)
    workers = WorkerGroup.current()
    context = Context(
        inputs={},
        model_kwargs={"num_labels": 2},
        output=folder,
        workers=workers,
        checkpoints=CheckpointStore(str(folder / "checkpoints"), workers),
        progress=lambda record: None,
    )
    engine = make_engine(context, model, task, config, zero, prune, plan)
    pruner = attach_pruner(engine, prune, prune.settings.schedule(100, 10), num_examples=8)
    found: list[int] = []

    def at_step(*_: Any) -> None:
        found.append(sum(size for at, size in held_bytes().items() if at not in before))

    engine.basic_optimizer.register_step_post_hook(at_step)
    for _ in range(2):
        tokens = torch.randint(5, 20, (2, 3))
        engine.backward(engine(input_ids=tokens, labels=torch.tensor([0, 1])).loss)
        engine.step()
    written = folder / case
    written.mkdir(exist_ok=True)
    write_checkpoint(
        written,
        engine=engine,
        pruner=pruner,
        records=None,
        done=TrainingState(),
        workers=workers,
    )
    dist.barrier()
    checkpoint = sum(file.stat().st_size for file in written.iterdir())
    engine.destroy()
    return {"held": max(found[len(found) // 2 :]), "checkpoint": checkpoint}


def measure_and_write(case: str, bert: str, folder: Path) -> None:
    found = measure(case, bert, folder)
    if dist.get_rank() == 0:
        (folder / f"{case}.json").write_text(json.dumps(found))


def main(bert: str, folder: str) -> None:
    """Measure all layouts and write what rank 0 holds."""
    dist.init_process_group("gloo")
    init_deepspeed("gloo")
    cases = {case: partial(measure_and_write, case, bert, Path(folder)) for case in CASES}
    run_cases(Path(folder), cases, seconds=120)
