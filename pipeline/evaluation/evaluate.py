"""The evaluation stage: each worker scores its share of the rows, the main one computes the metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.context import Context
from pipeline.evaluation.head import TokenScorer, find_layers_output, num_slices, vocabulary_of
from pipeline.metric import defined
from pipeline.models.loading import load_tokenizer
from pipeline.models.settings import load_model_config
from pipeline.models.source import ModelConfig
from pipeline.section import Positive, Section
from pipeline.tasks import Task
from pipeline.tasks.base import TokenTask, token_lengths
from pipeline.training.batches import loaded
from pipeline.training.deepspeed import ZeroConfig, init_deepspeed
from pipeline.training.engine import make_inference_model
from pipeline.worker_group import WorkerGroup

_FILLER = [-1]  # a batch that is not counted


class EvaluateConfig(Section):
    """How models are scored on the validation rows."""

    batch_size: Positive = 32
    """Rows a worker takes in one forward pass, at most."""
    batch_tokens: Positive = 32_768
    """Tokens a worker takes in one forward pass, padding included, at most, but one row always; where
    texts are generated, those whose keys and values are kept: of each beam, of source and text."""
    max_rows: Positive | None = None
    """Use only the first rows of each set."""

    def rows_of(self, tokens: int) -> int:
        """Return how many rows of so many tokens each are in a batch."""
        return max(min(self.batch_size, self.batch_tokens // tokens), 1)


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
    shares = _Shares.of(sets, task, config, zero, workers)
    num_batches = sum(map(len, shares.batches.values()))
    steps = count()
    metrics: dict[str, dict[str, float | None]] = {}
    for name, path in models.items():
        model_config = ModelConfig(path=str(path), trust_remote_code=trust_remote_code)
        infer = _Inference.load(context, model_config, task, config, zero, shares.most_tokens)
        found: dict[str, float | None] = {}
        for set_name, rows in sets.items():
            parts: list[dict[str, Tensor]] = []
            for batch in loaded(rows, shares.batches[set_name], collate, workers.device):
                parts.append(infer(batch))
                step = {"step": next(steps), "num_steps": len(models) * num_batches}
                context.progress({"event": "evaluate", "model": name, **step})
            gathered = workers.gather(_joined(parts, shares.num_rows(set_name)))
            if gathered is not None:
                scored = task.score(_in_order(gathered), rows, tokenizer)
                prefix = "" if set_name == "validation" else f"{set_name}/"
                found |= {f"{prefix}{metric}": defined(value) for metric, value in scored.items()}
        infer.close()
        if workers.is_main:
            metrics[name] = found
            undefined = [metric for metric, value in found.items() if value is None]
            if undefined:
                text = f"{', '.join(undefined)} of the {name} model cannot be computed; null is recorded"
                context.progress({"event": "note", "text": f"warning: {text}"})
    return metrics


@dataclass
class _Inference:
    """A loaded model, called with batches that lie on the CPU.

    Attributes:
        model: the model or its DeepSpeed engine; None once it was closed.
        task: what it is scored on.
        device: of the model.
        scorer: of a task that predicts tokens.
    """

    model: Any
    task: Task
    device: torch.device
    scorer: TokenScorer | None

    @classmethod
    def load(
        cls,
        context: Context,
        model_config: ModelConfig,
        task: Task,
        config: EvaluateConfig,
        zero: ZeroConfig,
        most_tokens: int,
    ) -> "_Inference":
        """Load a model; all workers call this function.

        Args:
            context: the workers.
            model_config: the model.
            task: what it is scored on.
            config: how.
            zero: precision, and whether the model is sharded.
            most_tokens: of a batch of any worker, padding included.
        """
        workers, layers = context.workers, None
        if isinstance(task, TokenTask):
            settings = load_model_config(model_config)
            trusted = model_config.trust_remote_code
            layers = find_layers_output(settings, task.auto_model, trust_remote_code=trusted)
            if layers is None and workers.is_main:
                text = f"{model_config.path}: logits cannot be made in slices: a batch's are whole"
                context.progress({"event": "note", "text": text})
        model = make_inference_model(model_config, task, zero, config.batch_size, workers)
        scorer = None
        if isinstance(task, TokenTask):
            together = zero.stage == 3
            least = num_slices(most_tokens, vocabulary_of(model)) if together else 1
            scorer = TokenScorer(task=task, model=model, layers=layers, least_slices=least)
        return cls(model=model, task=task, device=workers.device, scorer=scorer)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the metrics need of a batch, one row an example."""
        if self.scorer is not None:
            return self.scorer.infer(batch, self.device)
        on_device = {key: value.to(self.device) for key, value in batch.items()}
        return {key: value.cpu() for key, value in self.task.infer(self.model, on_device).items()}

    def close(self) -> None:
        """Let go of the model: the next one needs the memory."""
        if hasattr(self.model, "destroy"):  # a DeepSpeed engine, whose hooks hold it
            self.model.destroy()
        self.model = self.scorer = None


@dataclass(frozen=True, kw_only=True)
class _Shares:
    """What this worker scores of each set.

    Attributes:
        batches: numbers of rows, by set.
        most_tokens: of the largest batch of any worker, padding included.
    """

    batches: dict[str, list[list[int]]]
    most_tokens: int

    @classmethod
    def of(
        cls,
        sets: dict[str, Any],
        task: Task,
        config: EvaluateConfig,
        zero: ZeroConfig,
        workers: WorkerGroup,
    ) -> "_Shares":
        """Deal the rows in turn and cut each worker's into batches.

        Workers that share a sharded model run each forward pass together: one with fewer batches gets
        others that are not counted.
        """
        batches: dict[str, list[list[int]]] = {}
        most_tokens = 1
        for name, rows in sets.items():
            lengths = token_lengths(rows).tolist()
            tokens = [task.tokens_of(length) for length in lengths]
            of_workers = [
                token_batches(
                    range(rank, len(rows), workers.world_size),
                    tokens,
                    most_rows=config.batch_size,
                    most_tokens=config.batch_tokens,
                )
                for rank in range(workers.world_size)
            ]
            mine = of_workers[workers.rank]
            missing = max(map(len, of_workers)) - len(mine) if zero.stage == 3 else 0
            batches[name] = mine + [_FILLER] * missing
            sizes = (len(b) * max(lengths[i] for i in b) for of_one in of_workers for b in of_one)
            most_tokens = max([most_tokens, *sizes])
        return cls(batches=batches, most_tokens=most_tokens)

    def num_rows(self, name: str) -> int:
        """Return how many rows of a set are scored here."""
        return sum(len(batch) for batch in self.batches[name] if batch != _FILLER)


def _first(rows: Any, most: int | None) -> Any:
    return rows if most is None else rows.select(range(min(most, len(rows))))


def token_batches(
    rows: Sequence[int], tokens: Sequence[int], *, most_rows: int, most_tokens: int
) -> list[list[int]]:
    """Cut rows, in order, into batches of so many rows and, padded, so many tokens at most.

    Args:
        rows: numbers of the rows.
        tokens: of each row of the set; one of more than `most_tokens` is a batch of its own.
        most_rows: of a batch.
        most_tokens: of a batch, each row counted with the tokens of the longest.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, tokens[row])
        fits = batches and len(batches[-1]) < most_rows
        if not fits or (len(batches[-1]) + 1) * longest > most_tokens:
            batches.append([])
            longest = tokens[row]
        batches[-1].append(row)
    return batches


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
