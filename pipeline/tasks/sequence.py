"""Classification and regression of one or two texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import DataCollatorWithPadding

from pipeline import metric
from pipeline.tasks.base import (
    Metrics,
    Predictions,
    Task,
    TaskConfig,
    TokenizedData,
    input_features,
)
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Columns = Annotated[list[str], Field(min_length=1, max_length=2)]


class ClassificationConfig(TaskConfig):
    """Classification of one or two texts."""

    type: Literal["classification"]
    text: Columns
    """The column of the text, or the two columns of a pair."""
    label: str
    """The column of the label: integers or strings."""
    metric: Literal["accuracy", "f1", "matthews"] = "accuracy"
    """The metric shown first; all are computed."""


class RegressionConfig(TaskConfig):
    """Regression of a number from one or two texts."""

    type: Literal["regression"]
    text: Columns
    """The column of the text, or the two columns of a pair."""
    label: str
    """The column of the number."""
    metric: Literal["pearson", "spearman", "mse"] = "pearson"
    """The metric shown first; all are computed."""


class _SequenceTask(Task):
    auto_model = "AutoModelForSequenceClassification"

    def __init__(self, config: ClassificationConfig | RegressionConfig) -> None:
        self.config = config
        self.headline = config.metric

    def columns(self) -> dict[str, str]:
        texts = {f"task.text.{i}": column for i, column in enumerate(self.config.text)}
        return {**texts, "task.label": self.config.label}

    def text_columns(self) -> dict[str, str]:
        return {key: column for key, column in self.columns().items() if key != "task.label"}

    def check(self, splits: DatasetDict) -> None:
        self.labels(splits)

    def model_kwargs(self, splits: DatasetDict) -> dict[str, Any]:
        return self.labels(splits)[1]

    def tokenize(
        self, splits: DatasetDict, tokenizer: Any, mapper: RowMapper = IN_MEMORY
    ) -> TokenizedData:
        labels, model_kwargs = self.labels(splits)

        def encode(rows: dict[str, list[Any]], _: range) -> dict[str, Any]:
            texts = [rows[column] for column in self.config.text]
            encoded = tokenizer(*texts, truncation=True, max_length=self.config.max_length)
            return {**encoded, "labels": [labels(value) for value in rows[self.config.label]]}

        from datasets import DatasetDict, Value

        kind = Value("float64" if self.predicts_numbers else "int64")
        features = input_features(tokenizer, len(self.config.text), labels=kind)
        columns = list(dict.fromkeys(self.columns().values()))
        mapped = DatasetDict(
            {
                name: mapper.map("tokenize", name, split.select_columns(columns), encode, features)
                for name, split in splits.items()
            }
        )
        return TokenizedData(splits=mapped, model_kwargs=model_kwargs)

    def labels(self, splits: DatasetDict) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        """Return how a raw label becomes the model's, and what the model must know of it."""
        raise NotImplementedError

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        pad = DataCollatorWithPadding(tokenizer)
        return lambda rows: dict(pad(rows))

    def distillation_outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (outputs.logits,)

    def num_targets(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["labels"])


class Classification(_SequenceTask):
    """Scored by accuracy, F1 (of class 1 if there are two, else macro) and Matthews correlation."""

    metrics = (metric.share("accuracy"), metric.share("f1"), metric.correlation("matthews"))

    def label_columns(self) -> list[str]:
        return [self.config.label]

    def label_names(self, splits: DatasetDict) -> list[str]:
        from pipeline.tasks.label_checks import named_classes

        return named_classes(splits, self.config.label)[0]

    def labels(self, splits: DatasetDict) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        from pipeline.tasks.label_checks import named_classes

        names, index = named_classes(splits, self.config.label)
        id2label = dict(enumerate(names))
        return index.__getitem__, {
            "num_labels": len(names),
            "id2label": id2label,
            "label2id": {name: i for i, name in id2label.items()},
            "problem_type": "single_label_classification",
        }

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        label = batch["labels"]
        num_classes = torch.full_like(label, outputs.logits.shape[-1])
        return {
            "predicted": outputs.logits.argmax(dim=-1),
            "label": label,
            "num_classes": num_classes,
        }

    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # slow to import

        label, predicted = predictions["label"], predictions["predicted"]
        average = "binary" if predictions["num_classes"].max() == 2 else "macro"
        return {
            "accuracy": float(accuracy_score(label, predicted)),
            "f1": float(f1_score(label, predicted, average=average)),
            "matthews": float(matthews_corrcoef(label, predicted)),
        }


class Regression(_SequenceTask):
    """Scored by Pearson and Spearman correlation and mean squared error."""

    metrics = (
        metric.correlation("pearson"),
        metric.correlation("spearman"),
        metric.error("mse"),
    )
    predicts_numbers = True

    def labels(self, splits: DatasetDict) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        from pipeline.tasks.label_checks import refuse_no_numbers

        refuse_no_numbers(splits, self.config.label)
        return float, {"num_labels": 1, "problem_type": "regression"}

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "predicted": outputs.logits.squeeze(-1).to(torch.float32),
            "label": batch["labels"].to(torch.float32),
        }

    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        from scipy.stats import pearsonr, spearmanr  # slow to import
        from sklearn.metrics import mean_squared_error

        label = predictions["label"].astype(np.float64)
        predicted = predictions["predicted"].astype(np.float64)
        return {
            "pearson": float(pearsonr(label, predicted).statistic),
            "spearman": float(spearmanr(label, predicted).statistic),
            "mse": float(mean_squared_error(label, predicted)),
        }
