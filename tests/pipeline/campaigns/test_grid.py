"""A campaign's cells, its summary and what it writes."""

import csv
from statistics import mean, stdev

import pandas
import pytest
import yaml

from pipeline.campaigns.grid import campaign_cells, read_campaign
from pipeline.campaigns.report import CellResult, groups, render_campaign, write_campaign
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
    cells = campaign_cells(read())
    pruned = [cell for cell in cells if cell.is_pruned]
    assert len(pruned) == 2 * 2 * 2 * 2 * 3
    assert len({cell.title for cell in cells}) == len(cells) == len(pruned) + 2 * 2 * 3
    cell = next(c for c in cells if c.title == "rte large MGPP 95% seed 2")
    assert dict(o.split("=", 1) for o in cell.overrides) == {
        "train.lr": "3e-05",
        "model.path": '"b"',
        "zero.stage": "1",  # what is for all cells comes after what is for some
        "prune.method.name": '"mgpp"',
        "prune.sparsity": "0.95",
        "train.seed": "2",
    }


def test_the_first_seed_is_whole_before_the_next_begins(read):
    seeds = [cell.seed for cell in campaign_cells(read()) if cell.is_pruned]
    assert seeds == sorted(seeds)


def test_cells_may_be_left_out_and_added(read):
    listed = {"task": "rte", "model": "small", "method": "GMP", "sparsity": 0.5, "seed": 7}
    config = read(
        exclude=[{"task": "sst2", "model": "large"}, {"sparsity": 0.95, "seed": 2}],
        cells=[{**listed, "changes": {"train.lr": 1.0}}],
    )
    cells = campaign_cells(config)
    assert sum(cell.is_pruned for cell in cells) == 48 - 12 - 6 + 1
    (added,) = (cell for cell in cells if cell.is_pruned and cell.seed == 7)
    assert "train.lr=1.0" in added.overrides
    assert not any(cell.task == "sst2" and cell.model == "large" for cell in cells)
    assert sum(cell.seed == 7 for cell in cells) == 2  # its dense model


def test_a_list_may_stand_for_the_grid(read):
    listed = {"task": "rte", "model": "small", "method": "GMP", "sparsity": 0.5}
    cells = campaign_cells(read(sparsities=[], cells=[listed], dense=False))
    assert [cell.title for cell in cells] == ["rte small GMP 50% seed 0"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tasks": {}}, "tasks: "),
        ({"sparsities": []}, "no cells; give sparsities, or cells"),
        ({"exclude": [{}]}, "exclude[0]: empty"),
        ({"exclude": [{"method": "X"}]}, "exclude[0].method: got 'X'; allowed are GMP, MGPP"),
        (
            {"cells": [{"task": "sst2", "method": "GMP", "sparsity": 0.5}]},
            "cells[0].model: missing; allowed are small, large",
        ),
        (
            {"cells": [{"task": "rte", "model": "small", "method": "GMP", "sparsity": 0.9}]},
            "rte small GMP 90% seed 0: given twice",
        ),
        ({"methods": {"dense": {}}}, "'dense' is the model without pruning"),
        ({"tasks": {"a": {"recipe": "nowhere.yaml"}}}, "tasks.a.recipe: "),
        ({"grid": 1}, "grid: "),
    ],
)
def test_mistakes_are_told(read, changes, complaint):
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert any(complaint in str(problem) for problem in caught.value.problems), (
        caught.value.problems
    )


def results(config):
    made = []
    for i, cell in enumerate(campaign_cells(config)):
        failure = "it <broke>" if cell.title == "sst2 small GMP 90% seed 1" else ""
        made.append(
            CellResult(
                cell=cell,
                headline="accuracy",
                higher_is_better=True,
                metrics={} if failure else {"accuracy": 0.5 + i / 1000, "f1": i / 100},
                seconds={"data": 1.0, "dense": 10.0, "prune": 20.0, "evaluate": 3.0},
                num_workers=4,
                url="" if failure else f"runs/evaluate-{i}/a-0",
                failure=failure,
            )
        )
    return made


def test_the_summary_is_over_the_seeds_that_are_done(read):
    found = results(read())
    summary = {(g.task, g.model, g.method, g.sparsity): g for g in groups(found)}
    assert len(summary) == 2 * 2 * (2 * 2 + 1)
    whole = [
        r.metrics["accuracy"] for r in found if r.cell.title.startswith("rte large MGPP 95% seed")
    ]
    group = summary["rte", "large", "MGPP", 0.95]
    assert (group.mean, group.spread) == (mean(whole), stdev(whole))
    assert group.worker_seconds == ((20.0 + 3.0) * 4,) * 3
    assert summary["rte", "large", "dense", 0.0].worker_seconds == ((10.0 + 20.0 + 3.0) * 4,) * 3
    broken = summary["sst2", "small", "GMP", 0.9]
    assert (len(broken.values), broken.num_failed) == (2, 1)
    assert "(1 failed)" in broken.text


def test_the_tables_are_read_by_other_tools(read, tmp_path):
    config = read()
    found = results(config)
    told = write_campaign(tmp_path, config, found)
    assert told["num_failed"] == 1
    cells = pandas.read_parquet(tmp_path / "cells.parquet")
    assert len(cells) == len(found)
    assert cells["metric.f1"].isna().sum() == 1
    row = cells[cells.url == found[5].url].iloc[0]
    assert row["metric.accuracy"] == found[5].metrics["accuracy"]
    by_hand = cells[cells.state == "done"].groupby(["task", "model", "method", "sparsity"])
    summary = pandas.read_parquet(tmp_path / "summary.parquet").set_index(
        ["task", "model", "method", "sparsity"]
    )
    pandas.testing.assert_series_equal(
        by_hand["metric.accuracy"].mean().sort_index(),
        summary["mean"].sort_index(),
        check_names=False,
    )
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(cells.method)
    table = (tmp_path / "summary.md").read_text()
    assert table.count("| MGPP |") == 4
    assert "| | 90% zeros | 95% zeros |" in table


def test_the_page_shows_every_task_and_what_failed(read):
    config = read()
    page = render_campaign(config, results(config))
    for place in ("sst2, small", "sst2, large", "rte, small", "rte, large"):
        assert f"{place}: accuracy" in page
    assert "it &lt;broke&gt;" in page
    assert "it <broke>" not in page
    assert page.count('<script type="application/json"') == 4
