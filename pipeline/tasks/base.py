"""What a family of tasks must say: its columns, how it is tokenized, scored and which figure leads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.metric import Metric
from pipeline.section import Positive, Section
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

Metrics = dict[str, float]
Predictions = Mapping[str, np.ndarray]

_ROWS_AT_A_TIME = 100_000
UNLABELLED = -100  # the label of a token that is not predicted
DRAW_SEED = "draw_seed"  # in a row of training data: seeds what is drawn for it in this step


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a model whose loss is not used: given labels, it would compute it."""
    return {name: values for name, values in batch.items() if name != "labels"}


class TaskConfig(Section):
    """What every task's settings share.

    Attributes:
        only_scoring: settings that neither the rows nor training depend on.
    """

    only_scoring: ClassVar[frozenset[str]] = frozenset({"metric"})

    max_length: Positive = 128
    """Longest input in tokens; longer ones are cut (language modelling: the length of a block)."""


@dataclass(frozen=True, kw_only=True)
class TokenizedData:
    """A tokenized dataset and what the model must know of it.

    Attributes:
        splits: `train`, with model inputs only, and `validation`, with what scoring needs besides.
        model_kwargs: what the model's config takes from the data (num_labels, ...).
    """

    splits: DatasetDict
    model_kwargs: dict[str, Any]


class Task(ABC):
    """One family of tasks; built from its settings."""

    auto_model: ClassVar[str]
    """The transformers auto class that loads the model."""
    metrics: ClassVar[tuple[Metric, ...]]
    """All that `score` may return."""
    headline: str
    """Name of the metric shown first."""
    row_is_example: ClassVar[bool] = True
    """Whether counting rows counts examples; otherwise they must be tokenized for it."""
    draws_inputs: ClassVar[bool] = False
    """Whether the collator draws at random, for each row from the number at DRAW_SEED in it."""
    predicts_numbers: ClassVar[bool] = False
    """Whether the outputs are numbers; otherwise they are logits of choices."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger headline metric is better."""
        return self.metric(self.headline).higher_is_better

    def metric(self, name: str) -> Metric:
        """Return what a metric is; one of a further validation set is called `set/metric`."""
        known = {metric.name: metric for metric in self.metrics}
        return replace(known[name.rpartition("/")[2]], name=name)

    def written(self, metrics: Mapping[str, Metrics]) -> dict[str, dict[str, str]]:
        """Return the metrics of each model as text."""
        return {
            model: {name: self.metric(name).text(value) for name, value in of.items()}
            for model, of in metrics.items()
        }

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Return the data columns it needs: configuration key -> column name."""

    def text_columns(self) -> dict[str, str]:
        """Return those of the columns that must hold text."""
        return self.columns()

    def optional_columns(self) -> set[str]:
        """Return the names of those columns of text that some rows may have nothing in."""
        return set()

    def label_columns(self) -> list[str]:
        """Return the names of the columns that hold classes, as text or whole numbers."""
        return []

    def label_names(self, splits: DatasetDict) -> list[str] | None:
        """Return the names of the classes of raw rows by number; None if the task has none."""
        return None

    def check(self, splits: DatasetDict) -> None:  # noqa: B027  # most have no more to ask
        """Check raw rows beyond that; nothing unless a task has more to ask.

        Raises:
            ConfigError: if rows are not what the task needs.
        """

    def model_kwargs(self, splits: DatasetDict) -> dict[str, Any]:
        """Return what the model's config takes from raw rows (num_labels, ...)."""
        return {}

    @abstractmethod
    def tokenize(
        self, splits: DatasetDict, tokenizer: Any, mapper: RowMapper = IN_MEMORY
    ) -> TokenizedData:
        """Turn raw rows into model inputs.

        Args:
            splits: raw rows.
            tokenizer: the model's.
            mapper: what maps the rows.
        """

    def num_examples(self, rows: Dataset, tokenizer: Any, mapper: RowMapper = IN_MEMORY) -> int:
        """Return how many examples `tokenize` makes of a split; no more work than that takes."""
        return len(rows)

    @abstractmethod
    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Return the function that makes a batch of rows."""

    def infer(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch and keep what the metrics need, one row an example."""
        return self.predict(model(**without_labels(batch)), batch)

    def tokens_of(self, length: int) -> int:
        """Return how many tokens a row of so many input tokens takes in one forward pass."""
        return length

    def distillation_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs of a model that distillation compares with the teacher's.

        Here the logits of the tokens that are predicted: those whose label is -100 are not.

        Args:
            outputs: the model's.
            batch: its inputs, with labels.

        Returns:
            One or more [predictions, choices]; each counts the same.
        """
        logits, labels = outputs.logits, self.targets(batch)
        return (logits[:, : labels.shape[1]][labels != UNLABELLED],)

    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what each position is to predict: int64 [rows, positions], -100 where nothing."""
        labels = batch["labels"]
        # A position predicts the token after it; the last one none.
        return labels[:, 1:] if self.auto_model == "AutoModelForCausalLM" else labels

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Return over how many predictions the model's loss of a batch is a mean."""
        return int((self.targets(batch) != UNLABELLED).sum())

    @abstractmethod
    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reduce one batch's model outputs to what the metrics need, one row an example."""

    @abstractmethod
    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        """Compute the metrics over all examples, each of them one of `metrics`.

        Args:
            predictions: what `infer` returned, in the order of `rows`.
            rows: the tokenized validation rows.
            tokenizer: the model's.
        """


class TokenTask(Task):
    """A task scored by sums over the tokens that are predicted, each of them scored by itself.

    So the logits of all of them need never be there at once.
    """

    @abstractmethod
    def score_tokens(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Score predictions, each by itself.

        Args:
            logits: float32 [predictions, vocabulary].
            targets: int64 [predictions], the tokens to be predicted.

        Returns:
            Scores by name, [predictions] each, which are summed over those of a row.
        """

    def row_sums(self, scores: Mapping[str, Tensor], predicted: Tensor) -> dict[str, Tensor]:
        """Return each row's sums of scores, [rows] each, and `num_tokens`, its predictions.

        Args:
            scores: as `score_tokens` returns them, of all predictions in the order of rows and places.
            predicted: bool [rows, places], true where a token is predicted.
        """
        sums = {}
        for name, values in scores.items():
            placed = torch.zeros(predicted.shape, dtype=values.dtype, device=values.device)
            placed[predicted] = values
            sums[name] = placed.sum(dim=1)
        return {**sums, "num_tokens": predicted.sum(dim=1)}

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same of a batch whose logits are there, as `row_sums` does."""
        targets = self.targets(batch)
        predicted = targets != UNLABELLED
        logits = outputs.logits[:, : targets.shape[1]][predicted].float()
        return self.row_sums(self.score_tokens(logits, targets[predicted]), predicted)


def token_features(*names: str) -> Features:
    """Return the types of columns that hold lists of token numbers."""
    from datasets import Features, List, Value

    return Features({name: List(Value("int32")) for name in names})


def input_features(tokenizer: Any, num_texts: int, **labels: Any) -> Features:
    """Return the types of the columns that a tokenizer makes of texts.

    Args:
        tokenizer: the model's.
        num_texts: that go into a row, one or two.
        labels: types of further columns, by name.
    """
    from datasets import Features, List, Value

    types = {"input_ids": "int32"}
    names = tokenizer(*["a"] * num_texts)
    return Features({**{n: List(Value(types.get(n, "int8"))) for n in names}, **labels})


def token_lengths(rows: Dataset | list[dict[str, Any]]) -> Tensor:
    """Return the tokens of each tokenized row: 1-D int64, in the order of the rows."""
    if isinstance(rows, list):
        return torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int64)
    import pyarrow.compute as pc

    tables = rows.select_columns("input_ids").with_format("arrow").iter(_ROWS_AT_A_TIME)
    lengths = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
    return torch.from_numpy(np.concatenate(lengths or [np.empty(0)]).astype(np.int64))


def num_tokens(rows: Dataset) -> int:
    """Return how many tokens tokenized rows hold."""
    if "input_ids" not in rows.column_names:
        return 0  # no row at all came out of the tokenizer
    return int(token_lengths(rows).sum())
