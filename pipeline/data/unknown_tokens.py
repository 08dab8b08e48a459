"""Whether a tokenizer knows the words of a text."""

from itertools import islice
from typing import Any

from pipeline.errors import Problem

_ROWS = 1000
_CHARACTERS = 1_000_000


def unknown_problems(rows: Any, columns: list[str], tokenizer: Any) -> list[Problem]:
    """Return what is wrong with a tokenizer that maps most of a text to its unknown token.

    Args:
        rows: raw rows, by name of column; of the first thousand, the first million characters are
            looked at.
        columns: those of the texts.
        tokenizer: the model's.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    texts, room = [], _CHARACTERS
    for row in islice(rows, _ROWS):
        given = [row[column] for column in columns if isinstance(row.get(column), str)]
        texts += [text[:room] for text in given]
        room -= sum(map(len, given))
        if room <= 0:
            break
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
