"""Documents as one stream of tokens, cut into blocks of one length: what language models learn from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, Problem
from pipeline.tasks.base import num_tokens, token_features

if TYPE_CHECKING:
    from datasets import Dataset


def encode_documents(
    name: str, split: Dataset, column: str, tokenizer: Any, end: list[int], num_proc: int | None
) -> Dataset:
    """Return a split's documents as tokens; `datasets` keeps what it has once mapped.

    Args:
        name: of the split.
        split: raw rows, one a document; rows without text are left out.
        column: of the text.
        tokenizer: the model's; its special tokens are not put in.
        end: tokens put after each document.
        num_proc: processes that tokenize.
    """

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


def pack(
    name: str, documents: Dataset, length: int, before: list[int], after: list[int]
) -> Dataset:
    """Join all documents and cut the stream into blocks; what is left at its end is dropped.

    Args:
        name: of the split.
        documents: as `encode_documents` returns them.
        length: tokens of a block in all.
        before: special tokens each block begins with.
        after: special tokens each block ends with.

    Returns:
        Rows of `input_ids`, int32 [length].

    Raises:
        ConfigError: if the text does not fill one block.
    """
    inner = length - len(before) - len(after)
    if num_tokens(documents) < inner:
        raise ConfigError(
            [
                Problem(
                    "task.max_length",
                    f"{name} holds fewer than {inner} tokens, not one block",
                    hint="give more text or shorter blocks",
                )
            ]
        )
    from datasets import Dataset

    return Dataset.from_generator(
        _blocks,
        gen_kwargs={"documents": documents, "inner": inner, "before": before, "after": after},
        features=token_features("input_ids"),
    )


def _blocks(
    documents: Dataset, inner: int, before: list[int], after: list[int]
) -> Iterator[dict[str, list[int]]]:
    """Yield the blocks; in one process, so that the cuts depend on nothing else."""
    rest: list[int] = []
    for batch in documents.iter(1000):
        rest += chain.from_iterable(batch["input_ids"])
        whole = len(rest) // inner * inner
        for start in range(0, whole, inner):
            yield {"input_ids": [*before, *rest[start : start + inner], *after]}
        del rest[:whole]
