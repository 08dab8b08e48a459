"""The evaluation stage: each worker scores its share of the rows, the main one computes the metrics."""

from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from pipeline.engine import make_inference_model
from pipeline.gang import Gang
from pipeline.model import ModelConfig, load_tokenizer
from pipeline.recorder import Progress
from pipeline.section import Positive, Section
from pipeline.tasks import Task
from pipeline.tasks.base import Metrics
from pipeline.zero import ZeroConfig, init_deepspeed

VERSION = 1


class EvaluateConfig(Section):
    """How models are scored on the validation rows."""

    batch_size: Positive = 32
    """Rows a worker takes in one forward pass."""
    max_rows: Positive | None = None
    """Use only the first rows."""


def evaluate(
    *,
    models: dict[str, Path],
    task: Task,
    config: EvaluateConfig,
    zero: ZeroConfig,
    data: Path,
    trust_remote_code: bool,
    gang: Gang,
    progress: Progress,
) -> dict[str, Metrics]:
    """Score each model on the validation rows.

    Every row is scored once, by one worker, whatever the number of workers.

    Args:
        models: folders with trained models, by name ("dense", "pruned").
        task: what they are scored on.
        config: how.
        zero: precision, and whether the model is sharded (stage 3).
        data: the data stage's folder.
        trust_remote_code: run code that comes with the models.
        gang: the workers; all call this function.
        progress: called with the number of rows done.

    Returns:
        The metrics by model, on the main worker ({} elsewhere).
    """
    init_deepspeed(gang.backend)
    rows = load_from_disk(str(data / "dataset"))["validation"]
    if config.max_rows is not None:
        rows = rows.select(range(min(config.max_rows, len(rows))))
    tokenizer = load_tokenizer(ModelConfig(path=str(data / "tokenizer")))
    collate = task.collator(tokenizer)
    mine = list(range(gang.rank, len(rows), gang.world_size))
    if zero.stage == 3 and len(mine) < -(-len(rows) // gang.world_size):
        mine.append(-1)  # sharded workers run each forward pass together; this row is not counted
    batches = DataLoader(Subset(rows, mine), batch_size=config.batch_size, collate_fn=collate)
    metrics: dict[str, Metrics] = {}
    for number, (name, path) in enumerate(models.items()):
        config_of_model = ModelConfig(path=str(path), trust_remote_code=trust_remote_code)
        model = make_inference_model(config_of_model, task, zero, config.batch_size, gang)
        parts: list[dict[str, Tensor]] = []
        with torch.inference_mode():
            for i, batch in enumerate(batches):
                on_device = {key: value.to(gang.device) for key, value in batch.items()}
                predicted = task.infer(model, on_device)
                parts.append({key: value.cpu() for key, value in predicted.items()})
                progress(
                    {
                        "event": "evaluate",
                        "model": name,
                        "step": number * len(batches) + i,
                        "num_steps": len(models) * len(batches),
                    }
                )
        gathered = gang.gather(_joined(parts, num_rows=sum(i >= 0 for i in mine)))
        if gathered is not None:
            metrics[name] = task.score(_in_order(gathered), rows, tokenizer)
    return metrics


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
