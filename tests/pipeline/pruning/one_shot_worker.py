"""Run on ranks: prunes the tiny decoders in one shot on several ranks and writes what came out."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist

from pipeline.context import Context, never
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import PruneSection
from pipeline.pruning.one_shot import prune_one_shot
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tracking.recorder import Progress
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases

SLOW_IMPORTS = ("transformers.models.llama.modeling_llama",)  # before the ranks are forked
TASK = make_task(CausalLMConfig(type="causal-lm", max_length=10))
CASES: dict[str, dict[str, Any]] = {
    "llama-wanda": {"method": {"name": "wanda"}, "sparsity": 0.55},
    "llama-sparsegpt": {"method": {"name": "sparsegpt", "block_size": 5}, "sparsity": 0.55},
    "gpt2-wanda": {"method": {"name": "wanda"}, "pattern": "2:4", "sparsity": 0.5},
    "gpt2-sparsegpt": {"method": {"name": "sparsegpt"}, "sparsity": 0.3, "exclude": ["*.0.*"]},
    "mixtral-wanda": {"method": {"name": "wanda"}, "sparsity": 0.55},
    "gpt_oss-sparsegpt": {"method": {"name": "sparsegpt"}, "pattern": "2:4", "sparsity": 0.5},
    # More ranks than rows.
    "opt-sparsegpt": {"method": {"name": "sparsegpt"}, "sparsity": 0.5, "calibration_rows": 1},
}


def prune_of(case: str) -> PruneSection:
    return PruneSection(**{"calibration_rows": 7, **CASES[case]})


def run(
    case: str,
    folder: Path,
    output: Path,
    checkpoints: CheckpointStore,
    progress: Progress = lambda record: None,
    dtype: torch.dtype = torch.float32,
    is_to_stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    context = Context(
        inputs={"data": folder / "data"},
        model_kwargs={},
        output=output,
        workers=WorkerGroup.current(),
        checkpoints=checkpoints,
        progress=progress,
        is_to_stop=is_to_stop,
    )
    return prune_one_shot(
        context,
        model_config=ModelConfig(path=str(folder / case.partition("-")[0])),
        task=TASK,
        prune=prune_of(case),
        dtype=dtype,
        seed=0,
    )


def run_and_write(case: str, folder: Path, output: Path) -> None:
    store = CheckpointStore(f"{output / case}-checkpoints", WorkerGroup.current())
    figures = run(case, folder, output / case, store)
    (output / f"{case}-{dist.get_rank()}.json").write_text(json.dumps(figures))


def main(folder: str, output: str) -> None:
    dist.init_process_group("gloo")
    paths = Path(folder), Path(output)
    run_cases(paths[1], {case: partial(run_and_write, case, *paths) for case in CASES}, seconds=120)
