"""The evaluation stage: each worker scores its share of the rows, the main one computes the metrics."""

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.context import Context
from pipeline.metric import defined
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.section import Positive, Section
from pipeline.tasks import Task
from pipeline.training.batches import loaded
from pipeline.training.deepspeed import ZeroConfig, init_deepspeed
from pipeline.training.engine import make_inference_model
from pipeline.worker_group import WorkerGroup


class EvaluateConfig(Section):
    """How models are scored on the validation rows."""

    batch_size: Positive = 32
    """Rows a worker takes in one forward pass."""
    max_rows: Positive | None = None
    """Use only the first rows of each set."""


def evaluate(
    context: Context,
    *,
    models: dict[str, Path],
    task: Task,
    config: EvaluateConfig,
    zero: ZeroConfig,
    trust_remote_code: bool,
) -> dict[str, dict[str, float | None]]:
    """Score each model on the validation rows, and on those of further validation sets.

    Every row is scored once, by one worker, whatever the number of workers.

    Args:
        context: the data's folder and the workers, all of which call this function.
        models: folders with trained models, by name ("dense", "pruned").
        task: what they are scored on.
        config: how.
        zero: precision, and whether the model is sharded (stage 3).
        trust_remote_code: run code that comes with the models.

    Returns:
        The metrics by model, on the main worker ({} elsewhere); None is one that is not a number, as a
        correlation with predictions that are all the same. Those of a further set are called
        `set/metric`.
    """
    workers = context.workers
    init_deepspeed(workers.backend)
    splits = context.rows().items()
    sets = {name: _first(rows, config.max_rows) for name, rows in splits if name != "train"}
    tokenizer = load_tokenizer(ModelConfig(path=str(context.data / "tokenizer")))
    collate = task.collator(tokenizer)
    shares = {name: _share(rows, zero, workers) for name, rows in sets.items()}
    num_batches = sum(-(-len(share) // config.batch_size) for share in shares.values())
    steps = count()
    metrics: dict[str, dict[str, float | None]] = {}
    for name, path in models.items():
        config_of_model = ModelConfig(path=str(path), trust_remote_code=trust_remote_code)
        model = make_inference_model(config_of_model, task, zero, config.batch_size, workers)
        found: dict[str, float | None] = {}
        for set_name, rows in sets.items():
            mine = shares[set_name]
            parts: list[dict[str, Tensor]] = []
            starts = range(0, len(mine), config.batch_size)
            batches = [mine[start : start + config.batch_size] for start in starts]
            for batch in loaded(rows, batches, collate, workers.device):
                parts.append(_infer(task, model, batch, workers))
                step = {"step": next(steps), "num_steps": len(models) * num_batches}
                context.progress({"event": "evaluate", "model": name, **step})
            gathered = workers.gather(_joined(parts, num_rows=sum(i >= 0 for i in mine)))
            if gathered is not None:
                scored = task.score(_in_order(gathered), rows, tokenizer)
                prefix = "" if set_name == "validation" else f"{set_name}/"
                found |= {f"{prefix}{metric}": defined(value) for metric, value in scored.items()}
        if workers.is_main:
            metrics[name] = found
            undefined = [metric for metric, value in found.items() if value is None]
            if undefined:
                text = f"{', '.join(undefined)} of the {name} model cannot be computed; null is recorded"
                context.progress({"event": "note", "text": f"warning: {text}"})
    return metrics


def _first(rows: Any, most: int | None) -> Any:
    return rows if most is None else rows.select(range(min(most, len(rows))))


def _share(rows: Any, zero: ZeroConfig, workers: WorkerGroup) -> list[int]:
    """Return the rows this worker scores; -1 is one that is not counted."""
    mine = list(range(workers.rank, len(rows), workers.world_size))
    if zero.stage == 3 and len(mine) < -(-len(rows) // workers.world_size):
        mine.append(-1)  # sharded workers run each forward pass together
    return mine


def _infer(
    task: Task, model: Any, batch: dict[str, Tensor], workers: WorkerGroup
) -> dict[str, Tensor]:
    on_device = {key: value.to(workers.device) for key, value in batch.items()}
    with torch.inference_mode():
        return {key: value.cpu() for key, value in task.infer(model, on_device).items()}


def _joined(parts: list[dict[str, Tensor]], num_rows: int) -> dict[str, np.ndarray]:
    """Join one worker's batches, without the rows that only kept it in step."""
    if not parts:
        return {}
    return {name: torch.cat([part[name] for part in parts]).numpy()[:num_rows] for name in parts[0]}


def _in_order(gathered: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join all workers' predictions in the order of the rows, which they were dealt in turn."""
    filled = [part for part in gathered if part]  # a worker without rows sends none
    places = np.concatenate([np.arange(len(next(iter(p.values())))) for p in filled])
    ranks = np.concatenate([np.full(len(next(iter(p.values()))), r) for r, p in enumerate(filled)])
    order = np.lexsort((ranks, places))
    return {name: np.concatenate([part[name] for part in filled])[order] for name in filled[0]}
