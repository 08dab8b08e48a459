"""Causal language modelling: texts joined and cut into blocks, scored by perplexity."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import default_data_collator

from pipeline.errors import ConfigError
from pipeline.tasks.base import (
    Metrics,
    Predictions,
    Task,
    TaskConfig,
    TokenizedData,
    num_tokens,
)


class CausalLMConfig(TaskConfig):
    """Causal language modelling on blocks of `max_length` tokens."""

    type: Literal["causal-lm"]
    text: str = "text"
    """The column of the text."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Length of a block in tokens; its first token is not predicted."""
    end_of_text: bool = True
    """Put the end-of-text token after each row; false where a row is a line and not a document."""


def _blocks(documents: Dataset, length: int) -> Iterator[dict[str, list[int]]]:
    """Join all documents and cut the stream; one process, so that the cuts depend on nothing else."""
    rest: list[int] = []
    for batch in documents.iter(1000):
        rest += chain.from_iterable(batch["input_ids"])
        whole = len(rest) // length * length
        for start in range(0, whole, length):
            yield {"input_ids": rest[start : start + length]}
        del rest[:whole]


class CausalLM(Task):
    """Documents, one a row, are joined by the end-of-text token and cut into blocks."""

    auto_model = "AutoModelForCausalLM"
    headline = "perplexity"
    higher_is_better = False
    row_is_example = False

    def __init__(self, config: CausalLMConfig) -> None:
        self.config = config

    def columns(self) -> dict[str, str]:
        return {"task.text": self.config.text}

    def tokenize(self, splits: DatasetDict, tokenizer: Any, num_proc: int | None) -> TokenizedData:
        length = self.config.max_length
        blocks = DatasetDict()
        for name, split in splits.items():
            documents = self._encode(name, split, tokenizer, num_proc)
            if num_tokens(documents) < length:
                raise ConfigError(
                    [
                        f"task.max_length: {name} holds fewer than {length} tokens, not one block; "
                        "give more text or shorter blocks"
                    ]
                )
            blocks[name] = Dataset.from_generator(
                _blocks,
                gen_kwargs={"documents": documents, "length": length},
                features=Features(input_ids=List(Value("int32"))),
            )
        return TokenizedData(splits=blocks, model_kwargs={})

    def num_examples(self, rows: Dataset, tokenizer: Any, num_proc: int | None) -> int:
        documents = self._encode("train", rows, tokenizer, num_proc)
        return num_tokens(documents) // self.config.max_length

    def _encode(self, name: str, split: Dataset, tokenizer: Any, num_proc: int | None) -> Dataset:
        """Return a split's documents as tokens; `datasets` keeps what it has once mapped."""
        column = self.config.text
        ends = self.config.end_of_text and tokenizer.eos_token_id is not None
        end = [tokenizer.eos_token_id] if ends else []

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            # A row without text is a gap between paragraphs, not a document.
            texts = [str(text) for text in rows[column] if text is not None and str(text).strip()]
            if not texts:
                return {"input_ids": []}
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return {"input_ids": [document + end for document in ids]}

        return split.map(
            encode,
            batched=True,
            num_proc=num_proc,
            remove_columns=split.column_names,
            desc=f"tokenize {name}",
        )

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = default_data_collator(rows)
            return {**batch, "labels": batch["input_ids"]}  # the model shifts them

        return collate

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = outputs.logits[:, :-1].float().transpose(1, 2)
        losses = functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none")
        return {
            "loss": losses.double().sum(dim=1),
            "num_tokens": (batch["labels"][:, 1:] >= 0).sum(dim=1),
        }

    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        num_tokens = int(np.sum(predictions["num_tokens"]))
        loss = float(np.sum(predictions["loss"])) / num_tokens
        return {
            "perplexity": math.exp(min(loss, 700.0)),  # e^709 overflows a double
            "loss": loss,
            "num_tokens": float(num_tokens),
        }
