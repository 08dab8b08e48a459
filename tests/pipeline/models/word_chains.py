"""Text for the tiny decoders: words that tend to follow one another."""

import random
from pathlib import Path

from datasets import Dataset, DatasetDict

from tests.tiny import decoder_tokenizer


def text(num_words: int, seed: int) -> str:
    """Return words that tend to follow one another, so that inputs are correlated."""
    draw = random.Random(seed)
    number, words = 0, []
    for _ in range(num_words):
        number = (number + draw.choice([1, 1, 1, 2, 7])) % 30
        words.append(f"w{number}")
    return " ".join(words)


def write_blocks(folder: Path, num_blocks: int = 12, length: int = 10) -> None:
    """Write the data stage's folder."""
    tokenizer = decoder_tokenizer()
    ids = [tokenizer(text(length, seed))["input_ids"] for seed in range(num_blocks)]
    rows = Dataset.from_dict({"input_ids": ids})
    DatasetDict(train=rows, validation=rows).save_to_disk(str(folder / "dataset"))
    tokenizer.save_pretrained(folder / "tokenizer")
