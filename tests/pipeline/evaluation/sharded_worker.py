"""Run on ranks: models that predict tokens are scored whole on each worker, and sharded over them."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.context import Context
from pipeline.evaluation import head
from pipeline.evaluation.evaluate import EvaluateConfig, evaluate
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.instruction import InstructionConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked
# By default ZeRO 3 keeps weights as small as these whole, and nothing is gathered.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
KINDS = ("llama", "llama-tied", "gemma2")
CASES = {f"{kind}-stage{stage}": (kind, stage) for kind in KINDS for stage in (0, 3)}
VOCABULARY, WIDTH = 32, 16
SLICE = 5  # predictions
TASK = make_task(InstructionConfig(type="instruction", prompt=["a"], response="b"))
CONFIG = EvaluateConfig(batch_size=3, batch_tokens=24)


class Gathers(TorchDispatchMode):
    """Counts the elements that are gathered over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::_allgather_base_":
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


def score(kind: str, stage: int, folder: Path) -> None:
    """Score one model; write what the main worker finds, and each worker's batches and gathers."""
    head.SLICE_BYTES = 4 * VOCABULARY * SLICE
    workers = WorkerGroup.current()
    steps: list[int] = []
    gathered: list[int] = []

    def progress(record: dict[str, Any]) -> None:
        if record["event"] == "evaluate":
            steps.append(record["step"])
            gathered.append(gathers.numel)

    context = Context(
        inputs={"data": folder / "data"},
        model_kwargs={},
        output=folder,
        workers=workers,
        checkpoints=CheckpointStore(str(folder / "checkpoints"), workers),
        progress=progress,
    )
    with Gathers() as gathers:
        metrics = evaluate(
            context,
            models={"model": folder / kind, "again": folder / kind},
            task=TASK,
            config=CONFIG,
            zero=ZeroConfig(
                stage=stage,
                precision="fp32",
                bucket_elements=10_000,
                extra=SHARD_ALL if stage == 3 else {},
            ),
            trust_remote_code=False,
        )
    found = {"metrics": metrics, "steps": steps, "gathered": gathered}
    (folder / f"{kind}-stage{stage}-{workers.rank}.json").write_text(json.dumps(found))


def main(name: str) -> None:
    dist.init_process_group("gloo")
    cases = {case: partial(score, *what, Path(name)) for case, what in CASES.items()}
    run_cases(Path(name), cases, seconds=120)
