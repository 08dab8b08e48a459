"""The runs of a campaign: its grid, what is left out and added, the mistakes of its file."""

import pytest
import yaml

from pipeline.campaigns.grid import campaign_runs, read_campaign
from pipeline.errors import ConfigError

GRID = {
    "name": "grid",
    "tasks": {
        "sst2": {"recipe": "recipe.yaml"},
        "rte": {"recipe": "recipe.yaml", "changes": {"train": {"lr": 3e-5}}},
    },
    "models": {"small": {"model.path": "a"}, "large": {"model.path": "b", "zero.stage": 3}},
    "methods": {
        "GMP": {"prune": {"method": {"name": "gmp"}}},
        "MGPP": {"prune": {"method": {"name": "mgpp"}}},
    },
    "sparsities": [0.9, 0.95],
    "seeds": [0, 1, 2],
    "changes": {"zero": {"stage": 1}},
}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: recipe\n")

    def write_and_read(*overrides, **changes):
        path = tmp_path / "campaign.yaml"
        path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
        return read_campaign(str(path), overrides)

    return write_and_read


def test_the_grid_is_every_combination_once_and_a_dense_model_for_each(read):
    runs = campaign_runs(read())
    pruned = [run for run in runs if run.place.is_pruned]
    assert len(pruned) == 2 * 2 * 2 * 2 * 3
    assert len({run.title for run in runs}) == len(runs) == len(pruned) + 2 * 2 * 3
    run = next(c for c in runs if c.title == "rte large MGPP 95% seed 2")
    assert dict(o.split("=", 1) for o in run.overrides) == {
        "train.lr": "3e-05",
        "model.path": '"b"',
        "zero.stage": "1",  # what is for all runs comes after what is for some
        "prune.method.name": '"mgpp"',
        "prune.sparsity": "0.95",
        "train.seed": "2",
    }


def test_the_first_seed_is_whole_before_the_next_begins(read):
    seeds = [run.seed for run in campaign_runs(read()) if run.place.is_pruned]
    assert seeds == sorted(seeds)


def test_runs_may_be_left_out_and_added(read):
    listed = {"task": "rte", "model": "small", "method": "GMP", "sparsity": 0.5, "seed": 7}
    config = read(
        exclude=[{"task": "sst2", "model": "large"}, {"sparsity": 0.95, "seed": 2}],
        runs=[{**listed, "changes": {"train.lr": 1.0}}],
    )
    runs = campaign_runs(config)
    assert sum(run.place.is_pruned for run in runs) == 48 - 12 - 6 + 1
    (added,) = (run for run in runs if run.place.is_pruned and run.seed == 7)
    assert "train.lr=1.0" in added.overrides
    assert not any(run.place.task == "sst2" and run.place.model == "large" for run in runs)
    assert sum(run.seed == 7 for run in runs) == 2  # its dense model


def test_a_list_may_stand_for_the_grid(read):
    listed = {"task": "rte", "model": "small", "method": "GMP", "sparsity": 0.5}
    runs = campaign_runs(read(sparsities=[], runs=[listed], dense=False))
    assert [run.title for run in runs] == ["rte small GMP 50% seed 0"]


def test_a_campaign_of_one_recipe_names_neither_task_nor_model(read):
    config = read(tasks={}, models={}, recipe="recipe.yaml", sparsities=[0.5], seeds=[4])
    runs = campaign_runs(config)
    assert [run.title for run in runs] == ["dense seed 4", "GMP 50% seed 4", "MGPP 50% seed 4"]
    assert all(run.recipe == config.recipe for run in runs)


def test_a_task_without_a_recipe_takes_the_campaign_s(read, tmp_path):
    (tmp_path / "other.yaml").write_text("name: other\n")
    config = read(recipe="other.yaml", tasks={"a": {"recipe": "recipe.yaml"}, "b": {}})
    recipes = {run.place.task: run.recipe for run in campaign_runs(config)}
    assert recipes == {"a": str(tmp_path / "recipe.yaml"), "b": str(tmp_path / "other.yaml")}


def test_a_method_given_as_changes_alone_is_these_changes(read):
    whole = {"GMP": {"changes": {"prune.method": {"name": "gmp"}}}}
    short = {"GMP": {"prune.method": {"name": "gmp"}}}
    assert read(methods=whole).methods == read(methods=short).methods
    assert campaign_runs(read(methods=whole)) == campaign_runs(read(methods=short))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tasks": {}}, "recipe: missing"),
        ({"sparsities": []}, "no runs; give sparsities, or runs"),
        ({"exclude": [{}]}, "exclude[0]: empty"),
        ({"exclude": [{"method": "X"}]}, "exclude[0].method: got 'X'; allowed are GMP, MGPP"),
        (
            {"runs": [{"task": "sst2", "method": "GMP", "sparsity": 0.5}]},
            "runs[0].model: missing; allowed are small, large",
        ),
        (
            {"runs": [{"task": "rte", "model": "small", "method": "GMP", "sparsity": 0.9}]},
            "rte small GMP 90% seed 0: given twice",
        ),
        ({"methods": {"dense": {}}}, "'dense' is the model without pruning"),
        ({"tasks": {"a": {"recipe": "nowhere.yaml"}}}, "tasks.a.recipe: "),
        ({"grid": 1}, "grid: unknown key; allowed are name, recipe, storage"),
        ({"cells": []}, "cells: renamed, got []; write runs"),
        ({"cells_at_once": 3}, "cells_at_once: renamed, got 3; write runs_at_once"),
        ({"runs_at_once": 0}, "runs_at_once: input should be greater than or equal to 1, got 0"),
        ({"sparsities": [1.5]}, "sparsities.0: input should be less than 1, got 1.5"),
        ({"seeds": []}, "seeds: must have 1 or more entries, got []"),
        ({"methods": {"A": {"changes": {}, "candidate": []}}}, "allowed are changes, candidates"),
        ({"recipe": "nowhere.yaml"}, "recipe: "),
        ({"tasks": {"a": {}}}, "tasks.a.recipe: missing"),
        (
            {"tasks": {}, "recipe": "recipe.yaml", "exclude": [{"task": "a"}]},
            "exclude[0].task: got 'a'; allowed are none",
        ),
    ],
)
def test_mistakes_are_told(read, changes, complaint):
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert any(complaint in problem for problem in map(str, caught.value.problems)), (
        caught.value.problems
    )
