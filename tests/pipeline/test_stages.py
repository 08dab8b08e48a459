"""What a stage's key depends on: what changes its output, and nothing else."""

import pytest

from pipeline.config import parse_config
from pipeline.stages import plan_stages


def keys(tiny_bert, words_csv, **changes):
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
    return {stage.name: stage.key for stage in plan_stages(parse_config(values))}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"data", "dense", "prune", "evaluate", "export", "report"}),
        ({"task": {"stride": 8}}, set()),
        ({"task": {"num_best": 5, "max_answer_length": 7}}, {"data", "dense", "prune"}),
        ({"task": {"metric": "exact_match"}}, {"data", "dense", "prune", "evaluate", "export"}),
        ({"evaluate": {"batch_size": 5}}, {"data", "dense", "prune"}),
        ({"prune": {"sparsity": 0.6}}, {"data", "dense"}),
        ({"prune": {"scope": "uniform"}}, {"data", "dense"}),
        ({"prune": {"pattern": "2:4"}}, {"data", "dense"}),
        (
            {"prune": {"scope": "global", "budgets": {}, "min_kept": 0.0, "pattern": None}},
            {"data", "dense", "prune", "evaluate", "export", "report"},
        ),
        ({"prune": {"method": {"name": "platon", "beta1": 0.5}}}, {"data", "dense"}),
        ({"train": {"lr": 1e-3}}, {"data"}),
        ({"zero": {"precision": "bf16"}}, {"data"}),
        (
            {"cluster": {"num_workers": 4}, "zero": {"stage": 3, "offload_optimizer": True}},
            {"data", "dense", "prune", "evaluate", "export", "report"},
        ),
    ],
)
def test_a_change_makes_new_what_depends_on_it(tiny_bert, words_csv, changes, kept):
    before, after = keys(tiny_bert, words_csv), keys(tiny_bert, words_csv, **changes)
    assert {name for name in before if before[name] == after[name]} == kept


def test_what_places_sparsity_is_in_the_key_only_where_it_is_given(tiny_bert, words_csv):
    """So that what was pruned before there were such settings is found again."""
    prune = {"sparsity": 0.5, "min_kept": 0.1, "budgets": {"*.query.*": 0.4}}
    values = {
        "name": "keys",
        "model": {"path": str(tiny_bert)},
        "task": {"type": "question-answering"},
        "data": {"source": "files", "train": str(words_csv)},
        "prune": prune,
    }
    params = {s.name: s.params for s in plan_stages(parse_config(values))}["prune"]["prune"]
    assert (params["min_kept"], params["budgets"]) == (0.1, {"*.query.*": 0.4})
    assert not {"scope", "pattern"} & set(params)
