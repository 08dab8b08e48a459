"""Whether a tokenizer knows the words of a text."""

from itertools import islice
from typing import Any

from pipeline.errors import Problem

_ROWS = 1000


def unknown_problems(rows: Any, columns: list[str], tokenizer: Any) -> list[Problem]:
    """Return what is wrong with a tokenizer that maps most of a text to its unknown token.

    Args:
        rows: raw rows, by name of column; the first thousand are looked at.
        columns: those of the texts.
        tokenizer: the model's.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    texts = [
        row[column]
        for row in islice(rows, _ROWS)
        for column in columns
        if isinstance(row.get(column), str)
    ]
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    num_tokens = sum(map(len, encoded))
    share = sum(ids.count(unknown) for ids in encoded) / max(num_tokens, 1)
    if share <= 0.5:
        return []
    return [
        Problem(
            "model.path",
            f"its tokenizer does not know {share:.0%} of the training text's tokens "
            f"({tokenizer.unk_token})",
            hint="use a model whose tokenizer is for this text",
        )
    ]
