"""The demo's words: labelled as rated, split without overlap, the same for the same seed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.data import lexicon
from pipeline.data.lexicon import load_words
from pipeline.errors import ConfigError

pytest.importorskip("vaderSentiment", reason="the demo's data comes with vaderSentiment")


@pytest.fixture(scope="module")
def ratings():
    """Mean rating by word, read by position; of two the last one, as the package itself does."""
    path = Path(find_spec("vaderSentiment").origin).parent / "vader_lexicon.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    return {line.split("\t")[0]: float(line.split("\t")[1]) for line in lines if line}


def all_rows(splits):
    return [row for split in splits.values() for row in split]


def test_every_word_above_the_smallest_rating_is_labelled_by_its_sign(ratings):
    rows = all_rows(load_words())
    expected = {
        word: int(rating > 0)
        for word, rating in ratings.items()
        if word.isalpha() and abs(rating) >= 0.5
    }
    assert {row["word"]: row["label"] for row in rows} == expected
    assert len(expected) > 5000
    assert 0.3 < sum(row["label"] for row in rows) / len(rows) < 0.7


def test_a_word_that_the_file_rates_twice_is_taken_once(ratings):
    path = Path(find_spec("vaderSentiment").origin).parent / "vader_lexicon.txt"
    num_lines = len(path.read_text(encoding="utf-8").split("\n"))
    assert len(ratings) < num_lines - 1  # the file does rate some words twice
    words = [row["word"] for row in all_rows(load_words())]
    assert len(set(words)) == len(words)


def test_words_are_letters_only(ratings):
    assert any(not word.isalpha() for word in ratings)
    assert all(row["word"].isalpha() for row in all_rows(load_words()))


def test_the_labels_have_names():
    for split in load_words().values():
        assert split.features["label"].names == ["negative", "positive"]


@pytest.mark.parametrize("held_out", [0.1, 1 / 6, 0.5])
def test_a_share_is_held_out_and_overlaps_nothing(held_out):
    splits = load_words(held_out=held_out)
    train, validation = ([row["word"] for row in splits[n]] for n in ("train", "validation"))
    assert len(validation) == int((len(train) + len(validation)) * held_out)
    assert not set(train) & set(validation)


def test_the_seed_chooses_the_split():
    first, again, other = (load_words(seed=seed) for seed in (3, 3, 4))
    for name in ("train", "validation"):
        assert first[name].to_list() == again[name].to_list()
        assert first[name].to_list() != other[name].to_list()
    words = [sorted(row["word"] for row in all_rows(splits)) for splits in (first, other)]
    assert words[0] == words[1]


def test_both_splits_hold_both_labels_in_like_shares():
    shares = [sum(split["label"]) / len(split) for split in load_words().values()]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_a_higher_rating_takes_fewer_words(ratings):
    rows = all_rows(load_words(min_rating=2.5))
    assert all(abs(ratings[row["word"]]) >= 2.5 for row in rows)
    assert 0 < len(rows) < len(all_rows(load_words()))


def test_a_missing_package_is_a_problem_of_the_data(monkeypatch):
    def not_installed(path):
        raise ValueError(f"{path}: package 'vaderSentiment' is not installed")

    monkeypatch.setattr(lexicon, "resolve_path", not_installed)
    with pytest.raises(ConfigError, match=r"^data\.function: package:vaderSentiment/"):
        load_words()


def test_settings_are_chosen_on_training_words_alone():
    usual, choosing = load_words(), load_words(validate_on="training words")
    held_out = set(usual["validation"]["word"])
    train, validation = (set(choosing[n]["word"]) for n in ("train", "validation"))
    assert not (train | validation) & held_out
    assert train | validation == set(usual["train"]["word"])
    assert not train & validation
    assert len(validation) == len(held_out)


def test_what_to_validate_on_is_one_of_two():
    with pytest.raises(ConfigError, match=r"validate_on: got 'words'.*'training words'"):
        load_words(validate_on="words")
