"""Documents as one stream of tokens, cut into blocks of one length: what language models learn from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ConfigError, Problem
from pipeline.tasks.base import num_tokens, token_features
from pipeline.tasks.row_mapper import RowMapper

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_SAMPLE = 1000  # characters


def encode_documents(
    name: str, split: Dataset, column: str, tokenizer: Any, end: list[int], mapper: RowMapper
) -> Dataset:
    """Return a split's documents as tokens: rows of `input_ids`, int32.

    Args:
        name: of the split.
        split: raw rows, one a document; rows without text are left out.
        column: of the text.
        tokenizer: the model's; its special tokens are not put in.
        end: tokens put after each document.
        mapper: what tokenizes them.
    """

    def encode(rows: dict[str, list[Any]], _: range) -> dict[str, Any]:
        # A row without text is a gap between paragraphs, not a document.
        texts = [str(text) for text in rows[column] if text is not None and str(text).strip()]
        if not texts:
            return {"input_ids": []}
        return {"input_ids": _lists(_token_ids(tokenizer, texts), end)}

    features = token_features("input_ids")
    texts = split.select_columns([column])
    return mapper.map("tokenize", name, texts, encode, features, copies=3)


def pack(
    name: str,
    documents: Dataset,
    length: int,
    before: list[int],
    after: list[int],
    mapper: RowMapper,
) -> Dataset:
    """Join all documents and cut the stream into blocks; what is left at its end is dropped.

    Args:
        name: of the split.
        documents: as `encode_documents` returns them.
        length: tokens of a block in all.
        before: special tokens each block begins with.
        after: special tokens each block ends with.
        mapper: what writes them.

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

    import pyarrow as pa  # not there where rows are made elsewhere

    def tables() -> Iterator[pa.Table]:
        report = mapper.reporter(f"pack {name}", len(documents))
        for blocks, num_documents in _blocks(documents, inner):
            whole = np.empty((len(blocks), length), np.int32)
            whole[:, : len(before)] = before
            whole[:, len(before) : length - len(after)] = blocks
            whole[:, length - len(after) :] = after
            offsets = np.arange(len(blocks) + 1, dtype=np.int32) * length
            yield pa.table({"input_ids": pa.ListArray.from_arrays(offsets, whole.reshape(-1))})
            report(num_documents)

    return mapper.write("pack", name, tables(), token_features("input_ids"))


def _blocks(documents: Dataset, inner: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield blocks, int32 [blocks, inner], and the number of documents that were read for them.

    In one process, so that the cuts depend on nothing else.
    """
    rest = np.empty(0, np.int32)
    for batch in documents.data.to_batches():
        tokens = np.concatenate([rest, batch.column("input_ids").flatten().to_numpy()])
        whole = len(tokens) // inner * inner
        yield tokens[:whole].reshape(-1, inner), batch.num_rows
        rest = tokens[whole:]


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, without special ones.

    The tokenizer's backend is a seventh faster without the offsets that transformers has it count; it
    is called directly where it makes the same of a sample. (The call for that also turns off truncation
    and padding that an earlier one has set.)
    """
    sample = [texts[0][:_SAMPLE]]
    expected = tokenizer(sample, add_special_tokens=False)["input_ids"]
    if tokenizer.is_fast:
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        if [encode(sample, add_special_tokens=False)[0].ids] == expected:
            return [encoded.ids for encoded in encode(texts, add_special_tokens=False)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def _lists(documents: list[list[int]], end: list[int]) -> pa.ListArray:
    """Return lists of tokens, int32, each with `end` after it."""
    import pyarrow as pa

    lengths = [len(document) + len(end) for document in documents]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = chain.from_iterable(chain(document, end) for document in documents)
    values = np.fromiter(tokens, np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, values)
