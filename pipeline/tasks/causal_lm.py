"""Causal language modelling: texts joined and cut into blocks, scored by perplexity."""

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Literal

import numpy as np
from datasets import DatasetDict
from torch import Tensor
from torch.nn import functional
from transformers import default_data_collator

from pipeline.errors import ConfigError
from pipeline.tasks.base import Metrics, Predictions, Task, TaskConfig, TokenizedData


class CausalLMConfig(TaskConfig):
    """Causal language modelling on blocks of `max_length` tokens."""

    type: Literal["causal-lm"]
    text: str = "text"
    """The column of the text."""
    end_of_text: bool = True
    """Put the end-of-text token after each row; false where a row is a line and not a document."""


class CausalLM(Task):
    """Documents, one a row, are joined by the end-of-text token and cut into blocks."""

    auto_model = "AutoModelForCausalLM"
    headline = "perplexity"
    higher_is_better = False

    def __init__(self, config: CausalLMConfig) -> None:
        self.config = config

    def columns(self) -> dict[str, str]:
        return {"task.text": self.config.text}

    def tokenize(self, splits: DatasetDict, tokenizer: Any, num_proc: int | None) -> TokenizedData:
        length, column = self.config.max_length, self.config.text
        ends = self.config.end_of_text and tokenizer.eos_token_id is not None
        end = [tokenizer.eos_token_id] if ends else []

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            # A row without text is a gap between paragraphs, not a document.
            texts = [str(text) for text in rows[column] if str(text).strip()]
            if not texts:
                return {"input_ids": []}
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return {"input_ids": [document + end for document in ids]}

        def cut(rows: dict[str, list[Any]]) -> dict[str, Any]:
            joined = list(chain.from_iterable(rows["input_ids"]))
            blocks = [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]
            return {"input_ids": blocks}

        blocks = DatasetDict()
        for name, split in splits.items():
            kwargs = {"batched": True, "num_proc": num_proc, "batch_size": 10_000}
            documents = split.map(
                encode, remove_columns=split.column_names, desc=f"tokenize {name}", **kwargs
            )
            blocks[name] = documents.map(cut, desc=f"cut {name} into blocks", **kwargs)
            if len(blocks[name]) == 0:
                raise ConfigError(
                    [
                        f"task.max_length: {name} holds fewer than {length} tokens, not one block; "
                        "give more text or shorter blocks"
                    ]
                )
        return TokenizedData(splits=blocks, model_kwargs={})

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

    def score(self, predictions: Predictions) -> Metrics:
        num_tokens = int(np.sum(predictions["num_tokens"]))
        loss = float(np.sum(predictions["loss"])) / num_tokens
        return {
            "perplexity": math.exp(min(loss, 700.0)),  # e^709 overflows a double
            "loss": loss,
            "num_tokens": float(num_tokens),
        }
