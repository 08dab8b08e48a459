"""What a stage's key depends on: what changes its output, and nothing else."""

import shutil

import pytest

from pipeline.config import parse_config
from pipeline.stages import plan_stages


def keys(tiny_bert, words_csv, **changes):
    return {stage.name: stage.key for stage in stages(tiny_bert, words_csv, **changes)}


def stages(tiny_bert, words_csv, **changes):
    values = {
        "name": "keys",
        "storage": "runs",
        "model": {"path": str(tiny_bert)},
        "task": {"type": "question-answering", "max_length": 64, "stride": 16},
        "data": {"source": "files", "train": str(words_csv)},
        "train": {"length": 10},
        "prune": {"sparsity": 0.5},
    }
    for section, settings in changes.items():
        values[section] = {**values.get(section, {}), **settings}
    return plan_stages(parse_config(values))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"data", "dense", "prune", "evaluate", "export", "report"}),
        ({"task": {"stride": 8}}, set()),
        ({"task": {"num_best": 5, "max_answer_length": 7}}, {"data", "dense", "prune"}),
        ({"task": {"metric": "exact_match"}}, {"data", "dense", "prune", "evaluate", "export"}),
        ({"evaluate": {"batch_size": 5}}, {"data", "dense", "prune"}),
        ({"prune": {"sparsity": 0.6}}, {"data", "dense"}),
        ({"prune": {"method": {"name": "platon", "beta1": 0.5}}}, {"data", "dense"}),
        ({"train": {"lr": 1e-3}}, {"data"}),
        ({"zero": {"precision": "bf16"}}, {"data"}),
        ({"distill": {"teacher": "dense"}}, {"data", "dense"}),
        (
            {"cluster": {"num_workers": 4}, "zero": {"stage": 3, "offload_optimizer": True}},
            {"data", "dense", "prune", "evaluate", "export", "report"},
        ),
    ],
)
def test_a_change_makes_new_what_depends_on_it(tiny_bert, words_csv, changes, kept):
    before, after = keys(tiny_bert, words_csv), keys(tiny_bert, words_csv, **changes)
    assert {name for name in before if before[name] == after[name]} == kept


def test_a_dense_teacher_is_an_input_and_another_is_named_by_its_content(
    tiny_bert, words_csv, tmp_path
):
    def prune(**distill):
        made = stages(tiny_bert, words_csv, distill=distill)
        return next(stage for stage in made if stage.name == "prune")

    dense = prune(teacher="dense")
    assert dense.inputs == ("data", "dense")
    assert prune(weight=0.5, temperature=2.0).key == dense.key  # the defaults
    teacher, copied = tmp_path / "teacher", tmp_path / "copied"
    for folder in (teacher, copied):
        shutil.copytree(tiny_bert, folder)
    other = prune(teacher=str(teacher))
    assert other.inputs == ("data",)
    assert prune(teacher=str(copied)).key == other.key
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    keys = {
        prune(**changes).key
        for changes in (
            {"teacher": "dense"},
            {"teacher": "dense", "weight": 0.6},
            {"teacher": "dense", "temperature": 3},
            {"teacher": "dense", "hidden_weight": 1},
            {"teacher": str(teacher)},
            {"teacher": str(copied)},
        )
    }
    assert len(keys) == 6
