"""Instruction data: pairs of a prompt and a response, of which only the response is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline import metric
from pipeline.errors import ConfigError, Problem
from pipeline.section import OneOrMore
from pipeline.tasks.base import (
    Metrics,
    Predictions,
    TaskConfig,
    TokenizedData,
    TokenTask,
    token_features,
)
from pipeline.tasks.causal_lm import perplexity, token_losses
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_NOT_LEARNED = -100
_TOKENS = ("input_ids", "labels")


class InstructionConfig(TaskConfig):
    """Answering prompts, learned from pairs of a prompt and a response."""

    type: Literal["instruction"]
    prompt: Annotated[OneOrMore, Field(min_length=1)]
    """The column of the prompt; of several (an instruction and its input) those that are not empty are
    joined by the separator."""
    response: str
    """The column of the response."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest pair in tokens. Of a longer one the prompt loses its beginning, down to half of this
    length, and then the response its end."""
    separator: str = "\n"
    """Put between the columns of a prompt, and between prompt and response unless a template does so."""
    chat_template: bool = False
    """Use the tokenizer's chat template: the prompt is the user's turn, the response the assistant's."""


class Instruction(TokenTask):
    """Scored by the perplexity over response tokens, the end-of-text token after them included."""

    auto_model = "AutoModelForCausalLM"
    metrics = (
        metric.perplexity("perplexity"),
        metric.error("loss"),
        metric.count("num_tokens"),
    )
    headline = "perplexity"

    def __init__(self, config: InstructionConfig) -> None:
        self.config = config

    def columns(self) -> dict[str, str]:
        prompts = {f"task.prompt.{i}": column for i, column in enumerate(self.config.prompt)}
        return {**prompts, "task.response": self.config.response}

    def optional_columns(self) -> set[str]:
        return set(self.config.prompt) if len(self.config.prompt) > 1 else set()

    def check(self, splits: DatasetDict) -> None:
        for name, split in splits.items():
            self._refuse_missing(name, split)

    def tokenize(
        self, splits: DatasetDict, tokenizer: Any, mapper: RowMapper = IN_MEMORY
    ) -> TokenizedData:
        """Make `input_ids` and `labels`, which are -100 for the tokens of the prompt.

        Raises:
            ConfigError: if a row has no response, or a chat template is asked for and there is none,
                or it does not put the response after the prompt.
        """
        if self.config.chat_template and not tokenizer.chat_template:
            raise ConfigError(
                [
                    Problem(
                        "task.chat_template",
                        "the model's tokenizer has none",
                        hint="leave it out to join the texts",
                    )
                ]
            )

        def encode(rows: dict[str, list[Any]], _: range) -> dict[str, Any]:
            columns = [rows[column] for column in self.config.prompt]
            pairs = zip(*columns, rows[self.config.response], strict=True)
            encoded = [self._encode(tokenizer, list(texts), answer) for *texts, answer in pairs]
            return {name: [row[name] for row in encoded] for name in _TOKENS}

        from datasets import DatasetDict

        wanted = list(dict.fromkeys(self.columns().values()))
        mapped = DatasetDict()
        for name, split in splits.items():
            self._refuse_missing(name, split)
            rows = split.select_columns(wanted)
            mapped[name] = mapper.map("tokenize", name, rows, encode, token_features(*_TOKENS))
        return TokenizedData(splits=mapped, model_kwargs={})

    def _encode(self, tokenizer: Any, texts: list[Any], answer: Any) -> dict[str, list[int]]:
        given = [str(text) for text in texts if text is not None and str(text)]
        prompt = self.config.separator.join(given)
        if self.config.chat_template:
            begin: list[int] = []  # the template has what it wants of them
            end: list[int] = []
            prompt, response = _templated(tokenizer, prompt, str(answer))
        else:
            begin, end = _ends(tokenizer)
            prompt, response = prompt + self.config.separator, str(answer)
        # One by one: a token must not reach from the prompt into the response.
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], *end]
        longest, kept = self.config.max_length, self.config.max_length // 2
        room = max(longest - len(response_ids), kept) - len(begin)
        prompt_ids = [*begin, *prompt_ids[max(len(prompt_ids) - room, 0) :]]
        response_ids = response_ids[: longest - len(prompt_ids)]
        return {
            "input_ids": [*prompt_ids, *response_ids],
            "labels": [_NOT_LEARNED] * len(prompt_ids) + response_ids,
        }

    def _refuse_missing(self, name: str, split: Dataset) -> None:
        column = self.config.response
        missing = sum(text is None or not str(text).strip() for text in split[column])
        if missing:
            raise ConfigError(
                [
                    Problem(
                        "task.response",
                        f"{missing} rows of the {name} data have no text in column {column!r}",
                        hint="leave them out",
                    )
                ]
            )

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            inputs = {"input_ids": [row["input_ids"] for row in rows]}
            # On the right whatever the tokenizer's side: positions count from the left.
            batch = dict(tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
            labels = [torch.tensor(row["labels"]) for row in rows]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=_NOT_LEARNED)
            return batch

        return collate

    def score_tokens(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": token_losses(logits, targets)}

    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        return perplexity(predictions)


def _templated(tokenizer: Any, prompt: str, response: str) -> tuple[str, str]:
    """Return the texts of the prompt and of the response as the chat template writes them.

    Raises:
        ConfigError: if the template does not write the response after the prompt.
    """
    turn = {"role": "user", "content": prompt}
    answer = {"role": "assistant", "content": response}
    asked = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([turn, answer], tokenize=False)
    if not whole.startswith(asked):
        raise ConfigError(
            [
                Problem(
                    "task.chat_template",
                    "the tokenizer's template does not put the response after the prompt "
                    f"({asked[-40:]!r} is not in {whole[:200]!r})",
                    hint="leave it out to join the texts",
                )
            ]
        )
    return asked, whole[len(asked) :]


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token that the tokenizer begins a text with, if it does, and the end-of-text token."""
    alone = tokenizer("")["input_ids"]
    begins = bool(alone) and alone[0] == tokenizer.bos_token_id
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return alone[:1] if begins else [], end
