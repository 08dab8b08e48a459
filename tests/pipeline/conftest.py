"""Rows for the tiny BERT, made here: no test of the pipeline needs the network."""

from pathlib import Path

import pytest

from tests.tiny import BAD, GOOD


@pytest.fixture(scope="session")
def train_data(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data stage's folder: 48 rows of good and bad days, tokenized."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("train-data")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = [
        {**tokenizer(f"a {word} day"), "labels": label}
        for label, words in enumerate((BAD, GOOD))
        for word in words
    ]
    splits = DatasetDict(train=Dataset.from_list(rows * 3), validation=Dataset.from_list(rows))
    splits.save_to_disk(str(folder / "dataset"))
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder
