"""The recipes of GLUE: their metrics are GLUE's own, and they read the files GLUE is given in."""

import math
import re
import shlex
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.data.stage import load_splits, missing_columns
from pipeline.runs.config import parse_config, read_config
from pipeline.tasks import make_task
from tests.processes import ROOT

GLUE = ROOT / "configs" / "glue"


@dataclass(frozen=True)
class GlueTask:
    """What GLUE says of a task: its metrics, the headline first, and a training file's header and row."""

    metrics: list[str]
    header: str | None
    row: str
    labels: tuple[str, str]

    @property
    def columns(self):
        return self.header.split(" | ") if self.header else ["source", "label", "mark", "sentence"]

    def lines(self):
        """A file of two rows, with each label in its place."""
        header = [self.header] if self.header else []
        rows = [self.row.format(label=label) for label in self.labels]
        return "".join(line.replace(" | ", "\t") + "\n" for line in header + rows)


ENTAILMENT = ("entailment", "not_entailment")
PAIR = "index | sentence1 | sentence2 | label"
TASKS = {
    "cola": GlueTask(["matthews"], None, 'gj04 | {label} | * | They "drank" the pub.', ("1", "0")),
    "sst2": GlueTask(["accuracy"], "sentence | label", "a charming film | {label}", ("1", "0")),
    "mrpc": GlueTask(
        ["f1", "accuracy"],
        "Quality | #1 ID | #2 ID | #1 String | #2 String",
        '{label} | 7028 | 7029 | "One text | Another text',
        ("1", "0"),
    ),
    "stsb": GlueTask(
        ["pearson", "spearman"],
        "index | genre | filename | year | old_index | source1 | source2 | sentence1 | sentence2 | score",
        "0 | main | MSRvid | 2012 | 1 | none | none | A plane | An air plane | {label}",
        ("4.75", "0.5"),
    ),
    "qqp": GlueTask(
        ["f1", "accuracy"],
        "id | qid1 | qid2 | question1 | question2 | is_duplicate",
        "133 | 213 | 214 | How so? | Why? | {label}",
        ("0", "1"),
    ),
    "mnli": GlueTask(
        ["accuracy"],
        "index | promptID | pairID | genre | sentence1_binary_parse | sentence2_binary_parse | "
        "sentence1_parse | sentence2_parse | sentence1 | sentence2 | label1 | gold_label",
        "0 | 1 | 1n | fiction | ( | ( | ( | ( | It is so. | It is. | {label} | {label}",
        ("entailment", "neutral"),
    ),
    "qnli": GlueTask(
        ["accuracy"],
        "index | question | sentence | label",
        "0 | When? | Now. | {label}",
        ENTAILMENT,
    ),
    "rte": GlueTask(["accuracy"], PAIR, "0 | It is so. | It isn't. | {label}", ENTAILMENT),
    "wnli": GlueTask(["accuracy"], PAIR, "0 | I am it. | It is I. | {label}", ("1", "0")),
}
# The column of the label and those of the texts, in GLUE's own files.
COLUMNS = {
    "mrpc": ("Quality", "#1 String", "#2 String"),
    "stsb": ("score", "sentence1", "sentence2"),
    "qqp": ("is_duplicate", "question1", "question2"),
    "mnli": ("gold_label", "sentence1", "sentence2"),
    "qnli": ("label", "question", "sentence"),
    "rte": ("label", "sentence1", "sentence2"),
    "wnli": ("label", "sentence1", "sentence2"),
}


def recipe(task, overrides=()):
    values, problems = read_config(str(GLUE / f"{task}.yaml"), overrides)
    assert problems == []
    return parse_config(values)


def test_there_is_a_recipe_for_each_task():
    names = {path.stem for path in GLUE.glob("*.yaml") if not path.name.startswith("_")}
    assert names == set(TASKS)


# Metrics.


def accuracy(label, predicted):
    return (label == predicted).mean()


def f1(label, predicted):
    """Of class 1: GLUE's paraphrases and duplicates."""
    found = ((label == 1) & (predicted == 1)).sum()
    return 2 * found / ((label == 1).sum() + (predicted == 1).sum())


def matthews(label, predicted):
    table = np.array([[((label == i) & (predicted == j)).sum() for j in (0, 1)] for i in (0, 1)])
    (tn, fp), (fn, tp) = table.astype(float)
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def pearson(label, predicted):
    x, y = label - label.mean(), predicted - predicted.mean()
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


def spearman(label, predicted):
    """The correlation of ranks; ties share the mean of theirs."""

    def ranks(values):
        return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])

    return pearson(ranks(label), ranks(predicted))


OFFICIAL = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_glue_s_own(task):
    wanted = TASKS[task].metrics
    made = make_task(recipe(task).task)
    assert made.headline == wanted[0]
    generator = np.random.default_rng(0)
    if task == "stsb":
        label = np.round(generator.uniform(0, 5, 200), 1)
        predictions = {"label": label, "predicted": label + generator.normal(0, 2, 200)}
    else:
        num_classes = 3 if task == "mnli" else 2
        predictions = {
            "label": generator.integers(0, num_classes, 200),
            "predicted": generator.integers(0, num_classes, 200),
            "num_classes": np.full(200, num_classes),
        }
    found = made.score(predictions, None, None)
    for name in wanted:
        expected = OFFICIAL[name](predictions["label"], predictions["predicted"])
        assert found[name] == pytest.approx(expected, abs=1e-12), name


# GLUE's own files.


def command_of(task):
    """The overrides of the command in the comment at the recipe's top."""
    comment = [
        line[1:].strip().removesuffix("\\")
        for line in (GLUE / f"{task}.yaml").read_text().splitlines()
        if line.startswith("#   ")
    ]
    words = shlex.split(" ".join(comment))
    assert words[:3] == ["mgpp", "run", f"configs/glue/{task}.yaml"]
    return words[3:]


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("task", TASKS)
def test_the_command_in_a_recipe_reads_glue_s_own_files(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = command_of(task)
    glue = TASKS[task]
    for path in re.findall(r"[\w-]+/\w+\.tsv", " ".join(overrides)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(glue.lines())
    config = recipe(task, overrides)
    splits = load_splits(config.data)
    assert list(splits) == ["train", "validation", *(["mismatched"] if task == "mnli" else [])]
    made = make_task(config.task)
    assert missing_columns(config.data, made, splits) == []
    label, *texts = COLUMNS.get(task, ("label", "sentence"))
    first = dict(zip(glue.columns, glue.row.split(" | "), strict=True))
    for split in splits.values():
        assert [str(value) for value in split[config.task.label]] == list(glue.labels)
        assert [split[0][name] for name in config.task.text] == [first[name] for name in texts]
    assert first[label] == "{label}"
    assert made.labels(splits)[1]["num_labels"] == (1 if task == "stsb" else 2)
