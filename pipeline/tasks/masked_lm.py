"""Masked language modelling, as BERT is pretrained: finding tokens that were masked in blocks of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, default_data_collator

from pipeline import metric
from pipeline.errors import ConfigError, Problem, SettingError
from pipeline.section import Seed
from pipeline.tasks.base import (
    DRAW_SEED,
    Metrics,
    Predictions,
    TaskConfig,
    TokenizedData,
    TokenTask,
    num_tokens,
    token_features,
)
from pipeline.tasks.causal_lm import token_losses
from pipeline.tasks.packing import encode_documents, pack
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


class MaskedLMConfig(TaskConfig):
    """Masked language modelling on blocks of `max_length` tokens."""

    type: Literal["masked-lm"]
    text: str = "text"
    """The column of the text."""
    max_length: Annotated[int, Field(ge=4)] = 512
    """Length of a block in tokens, the special ones at its ends ([CLS], [SEP]) included."""
    separator: bool = True
    """Put the separator ([SEP]) between rows; false where a row is a line and not a document."""
    mask_share: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Probability of a token to be chosen, that is, to be predicted."""
    replace_share: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the chosen tokens that the mask token is put for."""
    random_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the chosen tokens that a random token is put for; the others stay as they are."""
    validation_seed: Seed = 0
    """Of the masks of the validation rows, which are drawn once; training draws new ones every time."""
    metric: Literal["perplexity", "accuracy"] = "perplexity"
    """The metric shown first; both are computed."""

    @model_validator(mode="after")
    def _check(self) -> MaskedLMConfig:
        if self.replace_share + self.random_share > 1 + 1e-9:
            raise SettingError(
                Problem(
                    "random_share",
                    f"with replace_share ({self.replace_share}) more than 1: both are shares of the same "
                    "tokens",
                    got=self.random_share,
                )
            )
        return self


class MaskedLM(TokenTask):
    """Documents, one a row, are joined and cut into blocks between the special tokens of a text.

    In training, masks are drawn as batches are made, for each row from a seed of the run, the step and
    the row's place in the step's batch: the same on any number of workers, and after a resume.
    """

    draws_inputs = True

    auto_model = "AutoModelForMaskedLM"
    metrics = (
        metric.perplexity("perplexity"),
        metric.share("accuracy"),
        metric.error("loss"),
        metric.count("num_tokens"),
    )
    row_is_example = False

    def __init__(self, config: MaskedLMConfig) -> None:
        self.config = config
        self.headline = config.metric

    def columns(self) -> dict[str, str]:
        return {"task.text": self.config.text}

    def tokenize(
        self, splits: DatasetDict, tokenizer: Any, mapper: RowMapper = IN_MEMORY
    ) -> TokenizedData:
        """Make blocks of `input_ids`; validation rows are masked here, and have `labels`.

        Raises:
            ConfigError: if a split does not fill one block, or the tokenizer has no mask token.
        """
        before, after = _special_tokens(tokenizer)
        from datasets import DatasetDict

        blocks = DatasetDict()
        for name, split in splits.items():
            documents = self._encode(name, split, tokenizer, mapper)
            blocks[name] = pack(name, documents, self.config.max_length, before, after, mapper)
            if name != "train":
                encode = partial(
                    _mask, draw=self._draw(tokenizer), seed=self.config.validation_seed
                )
                features = token_features("input_ids", "labels")
                blocks[name] = mapper.map("mask", name, blocks[name], encode, features)
        return TokenizedData(splits=blocks, model_kwargs={})

    def num_examples(self, rows: Dataset, tokenizer: Any, mapper: RowMapper = IN_MEMORY) -> int:
        inner = self.config.max_length - sum(map(len, _special_tokens(tokenizer)))
        return num_tokens(self._encode("train", rows, tokenizer, mapper)) // inner

    def _encode(self, name: str, split: Dataset, tokenizer: Any, mapper: RowMapper) -> Dataset:
        separated = self.config.separator and tokenizer.sep_token_id is not None
        end = [tokenizer.sep_token_id] if separated else []
        return encode_documents(name, split, self.config.text, tokenizer, end, mapper)

    def _draw(self, tokenizer: Any) -> _Masking:
        config = self.config
        return _Masking(tokenizer, config.mask_share, config.replace_share, config.random_share)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        draw = self._draw(tokenizer)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            if "labels" not in rows[0]:
                rows = [draw(row["input_ids"], row[DRAW_SEED]) for row in rows]
            return dict(default_data_collator(rows))

        return collate

    def score_tokens(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss of each prediction, and 1 where the token was found."""
        return {
            "loss": token_losses(logits, targets),
            "num_correct": (logits.argmax(dim=-1) == targets).long(),
        }

    def score(self, predictions: Predictions, rows: Dataset, tokenizer: Any) -> Metrics:
        """Compute loss, perplexity exp(loss) and accuracy over all chosen tokens."""
        num_chosen = int(np.sum(predictions["num_tokens"]))
        loss = float(np.sum(predictions["loss"])) / num_chosen
        return {
            "perplexity": math.exp(min(loss, 700.0)),  # e^709 overflows a double
            "accuracy": float(np.sum(predictions["num_correct"])) / num_chosen,
            "loss": loss,
            "num_tokens": float(num_chosen),
        }


class _Masking:
    """Chooses tokens of whole blocks and masks them; special tokens are never chosen."""

    def __init__(self, tokenizer: Any, share: float, replaced: float, random: float) -> None:
        before, after = _special_tokens(tokenizer)
        special = {*before, *after, tokenizer.sep_token_id} - {None}
        self._special = torch.tensor(sorted(special), dtype=torch.int64)
        self._collator = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=share,
            mask_replace_prob=replaced,
            random_replace_prob=min(random, 1 - replaced),  # 0.2 is more than 1 - 0.8
        )

    def __call__(self, block: list[int], seed: int, *, least: int = 0) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`, int64 [length]; -100 where nothing was chosen.

        Args:
            block: tokens of one row.
            seed: of the draw; torch's own generator is left as it is.
            least: it is drawn until so many tokens are chosen.
        """
        self._collator.generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([block])
        special = torch.isin(ids, self._special)
        while True:
            inputs, labels = self._collator.torch_mask_tokens(ids.clone(), special)
            if (labels >= 0).sum() >= least:
                return {"input_ids": inputs[0], "labels": labels[0]}


def _mask(
    rows: dict[str, list[Any]], places: range, draw: _Masking, seed: int
) -> dict[str, list[Any]]:
    """Mask rows, each by its place alone, so that whoever scores it sees the same."""
    masked = [
        draw(ids, seed * 1_000_003 + place, least=1)
        for ids, place in zip(rows["input_ids"], places, strict=True)
    ]
    return {name: [row[name].tolist() for row in masked] for name in ("input_ids", "labels")}


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a text begins and ends with.

    Raises:
        ConfigError: if the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    "its tokenizer has no mask token",
                    hint="masked-lm needs one, as BERT's has",
                )
            ]
        )
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return ids[:first], ids[last:]
