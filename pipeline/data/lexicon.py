"""The demo's data: the sentiment of single words, from the lexicon that `vaderSentiment` carries."""

import random
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from pipeline.errors import ConfigError, Problem
from pipeline.store.locations import resolve_path

_VALIDATE_ON = ("held-out words", "training words")


def load_words(
    *,
    min_rating: float = 0.5,
    held_out: float = 1 / 6,
    seed: int = 0,
    validate_on: str = "held-out words",
) -> DatasetDict:
    """Return words labelled negative or positive, split by a seeded shuffle.

    Args:
        min_rating: smallest |mean rating| (of -4 to 4) taken.
        held_out: share of the words kept for validation.
        seed: of the shuffle.
        validate_on: "held-out words", or "training words": then as many of the training words are the
            validation rows, no others are trained on, and the held-out words are not touched. Settings
            are chosen so.

    Raises:
        ConfigError: if the package is not installed, or `validate_on` is neither.
    """
    if validate_on not in _VALIDATE_ON:
        raise ConfigError(
            [
                Problem(
                    "data.arguments.validate_on",
                    got=validate_on,
                    allowed=tuple(map(repr, _VALIDATE_ON)),
                )
            ]
        )
    try:
        path = resolve_path("package:vaderSentiment/vader_lexicon.txt")
    except ValueError as error:
        raise ConfigError([Problem("data.function", str(error))]) from error
    with Path(path).open(encoding="utf-8") as file:
        fields = [line.split("\t") for line in file if line.strip()]
    rated = {word: float(rating) for word, rating, *_ in fields}  # some stand there twice
    rows = [
        {"word": word, "label": int(rating > 0)}
        for word, rating in rated.items()
        if word.isalpha() and abs(rating) >= min_rating
    ]
    random.Random(seed).shuffle(rows)
    num_held_out = int(len(rows) * held_out)
    if validate_on == "training words":
        rows = rows[num_held_out:]
    features = Features(word=Value("string"), label=ClassLabel(names=["negative", "positive"]))
    return DatasetDict(
        train=Dataset.from_list(rows[num_held_out:], features=features),
        validation=Dataset.from_list(rows[:num_held_out], features=features),
    )
