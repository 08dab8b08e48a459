"""Causal language modelling: texts joined and cut into blocks, scored by perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import default_data_collator

from pipeline import metric
from pipeline.tasks.base import (
    Metrics,
    Predictions,
    TaskConfig,
    TokenizedData,
    TokenTask,
    num_tokens,
)
from pipeline.tasks.packing import encode_documents, pack
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


class CausalLMConfig(TaskConfig):
    """Causal language modelling on blocks of `max_length` tokens."""

    type: Literal["causal-lm"]
    text: str = "text"
    """The column of the text."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Length of a block in tokens; its first token is not predicted."""
    end_of_text: bool = True
    """Put the end-of-text token after each row; false where a row is a line and not a document."""
    metric: Literal["perplexity", "word_perplexity"] = "perplexity"
    """The metric shown first; both are computed."""


class CausalLM(TokenTask):
    """Documents, one a row, are joined by the end-of-text token and cut into blocks."""

    auto_model = "AutoModelForCausalLM"
    metrics = (
        metric.perplexity("perplexity"),
        metric.perplexity("word_perplexity"),
        metric.error("loss"),
        metric.count("num_tokens"),
    )
    row_is_example = False

    def __init__(self, config: CausalLMConfig) -> None:
        self.config = config
        self.headline = config.metric

    def columns(self) -> dict[str, str]:
        return {"task.text": self.config.text}

    def tokenize(
        self, splits: DatasetDict, tokenizer: Any, mapper: RowMapper = IN_MEMORY
    ) -> TokenizedData:
        """Make blocks of `input_ids`; validation rows keep how many tokens a word of their text takes.

        Raises:
            ConfigError: if a split does not fill one block.
        """
        from datasets import DatasetDict

        blocks = DatasetDict()
        for name, split in splits.items():
            documents = self._encode(name, split, tokenizer, mapper)
            blocks[name] = pack(name, documents, self.config.max_length, [], [], mapper)
            if name != "train":
                ratio = num_tokens(documents) / self._num_words(split)
                column = [ratio] * len(blocks[name])  # of the whole text, so the same in each row
                blocks[name] = blocks[name].add_column("tokens_per_word", column)
        return TokenizedData(splits=blocks, model_kwargs={})

    def num_examples(self, rows: Dataset, tokenizer: Any, mapper: RowMapper = IN_MEMORY) -> int:
        documents = self._encode("train", rows, tokenizer, mapper)
        return num_tokens(documents) // self.config.max_length

    def _encode(self, name: str, split: Dataset, tokenizer: Any, mapper: RowMapper) -> Dataset:
        ends = self.config.end_of_text and tokenizer.eos_token_id is not None
        end = [tokenizer.eos_token_id] if ends else []
        return encode_documents(name, split, self.config.text, tokenizer, end, mapper)

    def _num_words(self, split: Dataset) -> int:
        return sum(
            len(str(text).split())
            for batch in split.select_columns([self.config.text]).iter(1000)
            for text in batch[self.config.text]
            if text is not None
        )

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = default_data_collator([{"input_ids": row["input_ids"]} for row in rows])
            return {**batch, "labels": batch["input_ids"]}  # the model shifts them

        return collate

    def score_tokens(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": token_losses(logits, targets)}

    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        """Compute the perplexity per token and per word.

        With L the summed negative log-likelihood of the P tokens predicted, perplexity is exp(L / P)
        and word perplexity exp((L / P) * (T / W)), as in lm-evaluation-harness's wikitext: W counts the
        words of the raw text, split at white space, and T all its tokens (end-of-text tokens too). P is
        less than T by the first token of each block and the tail that fills no block; these are taken
        to cost what the others do on average. Word perplexities of models with other tokenizers can be
        compared; those per token can't.
        """
        metrics = perplexity(predictions)
        tokens_per_word = float(rows[0]["tokens_per_word"])
        word = {"word_perplexity": _exp(metrics["loss"] * tokens_per_word)}
        return {"perplexity": metrics.pop("perplexity"), **word, **metrics}


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each prediction in nats, float64 to be summed.

    Args:
        logits: float32 [predictions, vocabulary].
        targets: int64 [predictions].
    """
    return functional.cross_entropy(logits, targets, reduction="none").double()


def perplexity(predictions: Predictions) -> Metrics:
    """Return the perplexity over all predicted tokens, whatever row they are in."""
    num_tokens = int(np.sum(predictions["num_tokens"]))
    loss = float(np.sum(predictions["loss"])) / num_tokens
    return {"perplexity": _exp(loss), "loss": loss, "num_tokens": float(num_tokens)}


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e^709 overflows a double
