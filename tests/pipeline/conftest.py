"""Rows for the tiny BERT, made here: no test of the pipeline needs the network."""

import csv
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


@pytest.fixture(scope="session")
def words_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV with the columns `text` and `label`: 48 rows, as many of each label."""
    path = tmp_path_factory.mktemp("words") / "words.csv"
    pairs = [(f"a {word} day", label) for label, words in enumerate((BAD, GOOD)) for word in words]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(pairs * 3)
    return path


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory):
    """Send what `datasets` keeps of read files to a temporary folder."""
    import datasets

    folder = str(tmp_path_factory.mktemp("datasets-cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        datasets.disable_progress_bars()
        yield Path(folder)
        datasets.enable_progress_bars()
