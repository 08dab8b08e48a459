"""Classification and regression: labels, tokens and scores against the formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.errors import ConfigError
from pipeline.tasks import TASKS, make_task
from pipeline.tasks.base import num_tokens, token_lengths
from pipeline.tasks.sequence import (
    Classification,
    ClassificationConfig,
    Regression,
    RegressionConfig,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


def classification(text=("text",), **settings):
    return Classification(
        ClassificationConfig(type="classification", text=list(text), label="label", **settings)
    )


def regression(text=("text",), **settings):
    return Regression(
        RegressionConfig(type="regression", text=list(text), label="label", **settings)
    )


def make_splits(train, validation, feature=None):
    """Splits with the given labels, each text a good day."""

    def split(labels):
        features = Features(text=Value("string"), label=feature) if feature else None
        rows = {"text": ["a good day"] * len(labels), "label": labels}
        return Dataset.from_dict(rows, features=features)

    return DatasetDict(train=split(train), validation=split(validation))


# Labels.


def test_token_lengths_are_those_of_the_rows_in_their_order():
    ids = [[1, 2, 3], [4], [5, 6]]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [0, 1, 0]}).select([2, 0, 1, 0])
    assert token_lengths(rows).tolist() == [2, 3, 1, 3]
    assert token_lengths(rows).dtype == torch.int64
    assert num_tokens(rows) == 9
    assert token_lengths(rows.select([])).tolist() == []


@pytest.mark.parametrize(
    ("train", "feature", "names", "mapped"),
    [
        ([1, 0, 1], ClassLabel(names=["bad", "good"]), ["bad", "good"], [1, 0, 1]),
        ([2, 2, 0], ClassLabel(names=["x", "y", "z"]), ["x", "y", "z"], [2, 2, 0]),
        ([1, 0, 1], None, ["0", "1"], [1, 0, 1]),
        ([7, 3, 10], None, ["3", "7", "10"], [1, 0, 2]),  # by number, not by text
        ([1, -1], None, ["-1", "1"], [1, 0]),
        (["yes", "no", "yes"], None, ["no", "yes"], [1, 0, 1]),
        ([True, False], None, ["False", "True"], [1, 0]),
    ],
)
def test_labels_become_numbers_from_zero(tokenizer, train, feature, names, mapped):
    splits = make_splits(train, train[:1], feature)
    tokenized = classification().tokenize(splits, tokenizer)
    assert tokenized.splits["train"]["labels"][:] == mapped
    assert tokenized.splits["validation"]["labels"][:] == mapped[:1]
    assert tokenized.model_kwargs == {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


@pytest.mark.parametrize(
    ("train", "validation", "feature", "why"),
    [
        ([0, 1], [0, 2], None, r"unseen in training: \[2\]"),
        (["a", "b"], ["c", "d"], None, r"unseen in training: \['c', 'd'\]"),
        ([0, 0], [1], ClassLabel(names=["x", "y"]), r"unseen in training: \['y'\]"),
        ([0, 0], [0], ClassLabel(names=["x", "y"]), r"only \['x'\]"),
        ([1, 1], [1], None, r"only \['1'\]"),
        ([0, 0], [0], ClassLabel(names=["x"]), r"only \['x'\]"),
        ([0, 1], [0, 2], ClassLabel(names=["x", "y", "z"]), r"unseen in training: \['z'\]"),
        ([0, 2], [3, 1], ClassLabel(names=["w", "x", "y", "z"]), r"training: \['x', 'z'\]"),
        ([True, True], [False], None, r"unseen in training: \[False\]"),
    ],
)
def test_labels_that_cannot_be_learned(tokenizer, train, validation, feature, why):
    splits = make_splits(train, validation, feature)
    with pytest.raises(ConfigError, match=f"task.label: column 'label' .*{why}"):
        classification().tokenize(splits, tokenizer)


@pytest.mark.parametrize(
    "names",
    [["pos", "neg"], ["neg", "positive"], ["neg", "pos", "neutral"], ["neg", "Pos"]],
)
@pytest.mark.parametrize("split", ["validation", "mismatched"])
def test_splits_that_number_the_classes_otherwise(tokenizer, names, split):
    splits = make_splits([0, 1], [1], ClassLabel(names=["neg", "pos"]))
    splits[split] = make_splits([0], [0, 1], ClassLabel(names=names))["validation"]
    with pytest.raises(ConfigError) as caught:
        classification().tokenize(splits, tokenizer)
    assert str(caught.value) == (
        f"task.label: the classes of column 'label' are {names} in the {split} data and "
        "['neg', 'pos'] in the train data, numbered from 0; give all splits the same ones in one order"
    )


def test_numbers_without_names_go_with_named_classes(tokenizer):
    splits = make_splits([0, 1], [1], ClassLabel(names=["neg", "pos"]))
    splits["validation"] = make_splits([1], [1, 0, 1])["validation"]
    tokenized = classification().tokenize(splits, tokenizer)
    assert tokenized.splits["validation"]["labels"][:] == [1, 0, 1]


@pytest.mark.parametrize(
    ("train", "validation", "feature"),
    [
        ([0, 1], [0, -1], ClassLabel(names=["x", "y"])),
        ([0, 1], [-1, -1], None),
        ([-1, 0, 1], [0], None),
        ([-1, 0], [0], None),
    ],
)
def test_minus_one_marks_rows_without_a_label(tokenizer, train, validation, feature):
    with pytest.raises(ConfigError, match=r"has -1, which marks rows without a label"):
        classification().tokenize(make_splits(train, validation, feature), tokenizer)


@pytest.mark.parametrize(
    ("train", "validation", "why"),
    [
        ([0, 1], ["0", "1"], "whole numbers in the train data and text in the validation data"),
        (["a", "b"], [0, 1], "text in the train data and whole numbers in the validation data"),
        ([0.0, 1.0], [0.0], "'label' of train holds Value.'float64'.; classification needs"),
        ([[0], [1]], [[0]], "'label' of train holds List"),
    ],
)
def test_labels_of_kinds_that_do_not_go_together(tokenizer, train, validation, why):
    with pytest.raises(ConfigError, match=why):
        classification().tokenize(make_splits(train, validation), tokenizer)


def test_few_of_many_unseen_labels_are_named(tokenizer):
    with pytest.raises(ConfigError, match=r"training: \[2, 3, 4, 5, 6\] and 93 more$"):
        classification().tokenize(make_splits([0, 1], list(range(100))), tokenizer)


def test_labels_of_a_further_validation_set_must_be_in_training_too(tokenizer):
    splits = make_splits(["a", "b"], ["a"])
    splits["other"] = make_splits(["a"], ["c"])["validation"]
    with pytest.raises(ConfigError, match=r"unseen in training: \['c'\]"):
        classification().tokenize(splits, tokenizer)


@pytest.mark.parametrize(
    ("train", "validation"),
    [(["a", "b", None], ["a"]), (["a", "b"], ["a", None]), ([0, None], [0])],
)
def test_a_missing_label_is_refused(tokenizer, train, validation):
    with pytest.raises(ConfigError, match=r"task\.label"):
        classification().tokenize(make_splits(train, validation), tokenizer)


def test_regression_takes_numbers_as_they_are(tokenizer):
    for values in ([0.5, -2.0, 3.25], [1, 2, 3]):
        splits = make_splits(values, values[:1])
        tokenized = regression().tokenize(splits, tokenizer)
        assert tokenized.splits["train"]["labels"][:] == values
        assert tokenized.splits["train"].features["labels"].dtype.startswith("float")
        assert tokenized.model_kwargs == {"num_labels": 1, "problem_type": "regression"}


@pytest.mark.parametrize("name", ["train", "validation"])
@pytest.mark.parametrize("feature", [Value("string"), ClassLabel(names=["x", "y"])])
def test_regression_refuses_what_is_no_number(tokenizer, name, feature):
    splits = make_splits([0.5], [0.5])
    label = "0.5" if feature == Value("string") else 1
    splits[name] = make_splits([label], [label], feature)["train"]
    with pytest.raises(ConfigError, match=f"'label' of {name} holds .*regression needs numbers"):
        regression().tokenize(splits, tokenizer)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint64", "int8", "float16", "float32"])
def test_regression_takes_numbers_of_any_width(tokenizer, kind):
    splits = make_splits([1, 0, 3], [2], Value(kind))
    tokenized = regression().tokenize(splits, tokenizer)
    assert tokenized.splits["train"]["labels"][:] == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("value", [1e300, -3.4e38, 1e20])
def test_regression_refuses_numbers_whose_square_float32_does_not_hold(tokenizer, value):
    assert torch.tensor(value).square().isinf()
    with pytest.raises(ConfigError, match="'label' of train holds numbers that are too large"):
        regression().tokenize(make_splits([0.5, value], [0.5]), tokenizer)
    regression().tokenize(make_splits([0.5, 1e19, -1e19], [0.5]), tokenizer)
    assert torch.tensor(1e19).square().isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_regression_refuses_what_is_not_finite(tokenizer, value):
    with pytest.raises(
        ConfigError, match=f"'label' of validation holds numbers that .*got {value}"
    ):
        regression().tokenize(make_splits([0.5, 1.0], [0.5, value]), tokenizer)


def test_regression_refuses_a_missing_number(tokenizer):
    with pytest.raises(ConfigError, match=r"task\.label"):
        regression().tokenize(make_splits([0.5, None], [0.5]), tokenizer)


# Tokens.


def test_texts_are_tokenized_as_the_tokenizer_does(tokenizer):
    texts = ["a good day", "bad", "a not so unknown day", ""]
    rows = Dataset.from_dict({"text": texts, "label": [0, 1, 0, 1], "other": [1, 2, 3, 4]})
    splits = DatasetDict(train=rows, validation=rows)
    tokenized = classification().tokenize(splits, tokenizer)
    for split in tokenized.splits.values():
        assert set(split.column_names) == {
            "input_ids",
            "token_type_ids",
            "attention_mask",
            "labels",
        }
        for row, text in zip(split, texts, strict=True):
            assert row["input_ids"] == tokenizer(text)["input_ids"]


def test_pairs_are_tokenized_as_the_tokenizer_does(tokenizer):
    first, second = ["a good day", "bad"], ["a fine day", "not bad not sad"]
    rows = Dataset.from_dict({"one": first, "two": second, "label": [0, 1]})
    task = classification(text=("one", "two"), max_length=8)
    split = task.tokenize(DatasetDict(train=rows, validation=rows), tokenizer).splits["train"]
    for row, pair in zip(split, zip(first, second, strict=True), strict=True):
        expected = tokenizer(*pair, truncation=True, max_length=8)
        assert {name: row[name] for name in expected} == dict(expected)
    assert len(split[0]["input_ids"]) == 8  # [CLS] and two [SEP] among them
    assert set(split[1]["token_type_ids"]) == {0, 1}


def test_texts_longer_than_max_length_are_cut(tokenizer):
    rows = Dataset.from_dict({"text": ["a good day " * 20] * 2, "label": [0, 1]})
    task = classification(max_length=5)
    split = task.tokenize(DatasetDict(train=rows, validation=rows), tokenizer).splits["train"]
    assert split[0]["input_ids"] == tokenizer("a good day")["input_ids"]


def test_a_batch_is_padded_to_its_longest_row(tokenizer):
    collate = classification().collator(tokenizer)
    texts = ["a good day", "bad"]
    batch = collate([{**tokenizer(text), "labels": label} for label, text in enumerate(texts)])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].shape == (2, 5)
    assert batch["input_ids"][1, 3:].tolist() == [tokenizer.pad_token_id] * 2
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 3]
    numbers = collate([{**tokenizer("a"), "labels": 0.25}])
    assert numbers["labels"].is_floating_point()


def test_needed_columns_are_named_by_their_keys():
    task = classification(text=("one", "two"))
    assert task.columns() == {"task.text.0": "one", "task.text.1": "two", "task.label": "label"}


# Predictions and scores.


def score_of(label, predicted, num_classes):
    counts = np.full(len(label), num_classes)
    return classification().score(
        {"label": label, "predicted": predicted, "num_classes": counts}, None, None
    )


def test_f1_of_three_classes_is_macro_even_where_only_two_occur():
    label, predicted = np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1])
    assert score_of(label, predicted, num_classes=2)["f1"] == pytest.approx(4 / 5)
    assert score_of(label, predicted, num_classes=3)["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_the_predicted_class_is_the_largest_logit():
    outputs = SimpleNamespace(logits=torch.tensor([[0.1, 2.0, -1.0], [5.0, 4.0, 4.5]]))
    predicted = classification().predict(outputs, {"labels": torch.tensor([2, 0])})
    assert predicted["predicted"].tolist() == [1, 0]
    assert predicted["label"].tolist() == [2, 0]


def test_a_predicted_number_is_float32_whatever_the_model_computes_in():
    outputs = SimpleNamespace(logits=torch.tensor([[0.5], [-2.0]], dtype=torch.bfloat16))
    predicted = regression().predict(outputs, {"labels": torch.tensor([1.0, 2.0])})
    assert predicted["predicted"].dtype == predicted["label"].dtype == torch.float32
    assert predicted["predicted"].tolist() == [0.5, -2.0]


def test_the_headline_is_the_chosen_metric():
    for metric in ("accuracy", "f1", "matthews"):
        task = classification(metric=metric)
        assert (task.headline, task.higher_is_better) == (metric, True)
    for metric, higher in (("pearson", True), ("spearman", True), ("mse", False)):
        task = regression(metric=metric)
        assert (task.headline, task.higher_is_better) == (metric, higher)


def test_scores_of_a_table_worked_out_by_hand():
    label = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    predicted = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    scores = score_of(label, predicted, num_classes=2)
    # 3 true positives, 2 false, 4 true negatives, 1 false.
    assert scores == pytest.approx(
        {
            "accuracy": 7 / 10,
            "f1": 2 * 3 / (2 * 3 + 2 + 1),
            "matthews": (3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5),
        }
    )


labels = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)


@pytest.mark.filterwarnings("ignore::UserWarning")  # scores that are 0 by convention
@settings(deadline=None, max_examples=40)
@given(pairs=labels)
def test_scores_of_two_classes_follow_the_formulas(pairs):
    label, predicted = (np.array(column) for column in zip(*pairs, strict=True))
    tp, fp, fn, tn = (
        int(((predicted == p) & (label == true)).sum())
        for p, true in ((1, 1), (1, 0), (0, 1), (0, 0))
    )
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = {
        "accuracy": (tp + tn) / len(label),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
        "matthews": (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0,
    }
    found = score_of(label, predicted, num_classes=2)
    assert found == pytest.approx(expected, abs=1e-12)


def test_scores_of_three_classes_follow_the_formulas():
    generator = np.random.default_rng(0)
    label, predicted = generator.integers(0, 3, 50), generator.integers(0, 3, 50)
    f1 = []
    for k in range(3):
        tp = ((predicted == k) & (label == k)).sum()
        f1.append(2 * tp / ((predicted == k).sum() + (label == k).sum()))
    # Gorodkin's R_K, from the counts of each class.
    correct, total = (predicted == label).sum(), len(label)
    p, t = (np.bincount(values, minlength=3).astype(float) for values in (predicted, label))
    matthews = (correct * total - p @ t) / math.sqrt((total**2 - p @ p) * (total**2 - t @ t))
    found = score_of(label, predicted, num_classes=3)
    assert found == pytest.approx(
        {"accuracy": correct / total, "f1": np.mean(f1), "matthews": matthews}
    )


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x @ y) / math.sqrt((x @ x) * (y @ y))


def average_ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_of_a_regression_follow_the_formulas(seed):
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 6, 40).astype(np.float32)  # with ties
    predicted = (0.5 * label + generator.normal(size=40)).astype(np.float32)
    x, y = label.astype(np.float64), predicted.astype(np.float64)
    found = regression().score({"label": label, "predicted": predicted}, rows=None, tokenizer=None)
    assert found == pytest.approx(
        {
            "pearson": pearson(x, y),
            "spearman": pearson(average_ranks(x), average_ranks(y)),
            "mse": ((x - y) ** 2).mean(),
        },
        abs=1e-9,
    )


# The registry.


def test_a_task_is_made_by_the_type_of_its_settings():
    assert set(TASKS) == {
        "classification",
        "regression",
        "causal-lm",
        "instruction",
        "masked-lm",
        "question-answering",
        "text-to-text",
    }
    config = RegressionConfig(type="regression", text=["a"], label="b")
    task = make_task(config)
    assert isinstance(task, Regression)
    assert task.config is config
