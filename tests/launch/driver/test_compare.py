"""A comparison end to end: real Ray, real DeepSpeed, two methods on a tiny random BERT."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from pipeline.tracking.recorder import read_records
from tests.launch.conftest import mgpp

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def comparison(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    values = {
        "name": "tiny",
        "recipe": str(project / "run.yaml"),
        "storage": str(folder / "runs"),
        "changes": {
            "dense.enabled": False,
            "cluster.num_workers": 1,
            "zero.stage": 0,
            "train.length": 12,
            "dense.length": 12,
            "prune.finetune": 2,
            "evaluate.max_rows": 40,
        },
        "sparsities": [0.5],
        "seeds": [0],
        "selection": {"changes": {"data.split_seed": 1}},
        "methods": {
            "GMP": {
                "changes": {"prune.method": {"name": "gmp"}},
                "candidates": [{}, {"train.lr": 2}],
            },
        },
        "cells_at_once": 2,
    }
    (folder / "comparison.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def compared(project, comparison):
    done = mgpp(project, "compare", str(comparison / "comparison.yaml"), "--json")
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout), done.stderr


def test_the_table_holds_what_the_cells_evaluated_to(compared, comparison):
    result, _ = compared
    assert [row["method"] for row in result["rows"]] == ["dense", "GMP"]
    evaluations = list((comparison / "runs").glob("evaluate-*/_DONE.json"))
    assert len(evaluations) == 2 + 2
    scores = [json.loads(path.read_text())["metrics"] for path in evaluations]
    pruned = {metrics["pruned"]["accuracy"] for metrics in scores if "pruned" in metrics}
    (value,) = result["rows"][1]["values"]
    assert value in pruned
    assert result["rows"][0]["values"] == [m["dense"]["accuracy"] for m in scores if "dense" in m]


def test_the_candidate_that_scored_best_was_chosen(compared):
    result, _ = compared
    best = max(result["selection"], key=lambda cell: cell["value"])
    assert result["rows"][1]["settings"] == best["settings"]


def test_table_and_plot_are_written_and_progress_is_told(compared):
    result, stderr = compared
    folder = Path(result["url"])
    assert {path.name for path in folder.iterdir()} == {
        *(f"comparison.{suffix}" for suffix in ("json", "csv", "md", "png")),
        "curves.csv",
        "curves.png",
    }
    with (folder / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    trained = [
        [r["loss"] for r in read_records(path)["step"]]
        for path in folder.parent.parent.glob("prune-*/a-*/metrics.jsonl")
    ]
    assert len(trained) == 2 + 1
    assert [float(point["loss"]) for point in points] in trained
    assert "2 cells, 0 of them done before" in stderr
    assert "GMP 50% candidate 1 seed 0: accuracy" in stderr


def test_cells_that_are_done_are_not_run_again(compared, comparison, project):
    lost = next((comparison / "runs").glob("compare-*")) / "_DONE.json"
    lost.unlink()
    again = mgpp(project, "compare", str(comparison / "comparison.yaml"), "--json", timeout=120)
    assert again.returncode == 0, again.stderr[-4000:]
    assert json.loads(again.stdout)["rows"] == compared[0]["rows"]
    assert "2 cells, 2 of them done before" in again.stderr


@pytest.mark.torture
def test_a_cell_that_fails_does_not_stop_the_others(comparison, project):
    values = yaml.safe_load((comparison / "comparison.yaml").read_text())
    values["methods"]["broken"] = {
        "changes": {"train.lr": 1e30, "prune.method": {"name": "gmp"}},
        "candidates": [{}, {}],
    }
    (comparison / "broken.yaml").write_text(yaml.safe_dump(values))
    done = mgpp(project, "compare", str(comparison / "broken.yaml"), "--json", timeout=240)
    assert done.returncode == 1
    (error,) = json.loads(done.stdout)["errors"]
    assert error.startswith(("1 of 4 cells failed", "2 of 4 cells failed"))
    assert "broken 50% candidate 1" in error
