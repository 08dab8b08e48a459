"""Campaigns end to end: real Ray, real DeepSpeed, a tiny random BERT, two campaigns on one store."""

import json
import time

import pandas
import pytest
import yaml

from tests.launch.conftest import mgpp
from tests.launch.runs import Driver
from tests.processes import MGPP

pytestmark = pytest.mark.distributed


def write(project, folder, **changes):
    values = {
        "name": "tiny",
        "storage": str(folder / "runs"),
        "changes": {
            "cluster.num_workers": 1,
            "zero.stage": 0,
            "train.length": 12,
            "dense.length": 12,
            "dense.lr": 0.002,  # or that of train, which one of the methods changes
            "prune.finetune": 2,
            "prune.start": "dense",
            "evaluate.max_rows": 40,
        },
        "tasks": {"words": {"recipe": str(project / "run.yaml")}},
        "methods": {
            "GMP": {"prune.method": {"name": "gmp"}},
            "MGPP": {"prune.method": {"name": "mgpp"}},
        },
        "sparsities": [0.5],
        "runs_at_once": 2,
        **changes,
    }
    path = folder / "campaign.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def campaign_in_background(path, folder):
    return Driver([MGPP, "campaign", path], folder / "runs")


def artifacts(folder, stage):
    """Each attempt at a stage that ended well, by key."""
    return {
        p.parent.name: json.loads(p.read_text()) for p in folder.glob(f"runs/{stage}-*/_DONE.json")
    }


def attempts(folder, stage):
    return list(folder.glob(f"runs/{stage}-*/a-*"))


@pytest.mark.timeout(900)
def test_two_campaigns_on_one_store_share_the_work_and_a_failure_stops_neither(project, tmp_path):
    broken = {"BROKEN": {"prune.method": {"name": "gmp"}, "train.lr": 1e30}}
    methods = {
        "GMP": {"prune.method": {"name": "gmp"}},
        "MGPP": {"prune.method": {"name": "mgpp"}},
        **broken,
    }
    path = write(project, tmp_path, methods=methods)
    waiting = json.loads(mgpp(project, "campaign", "status", path, "--json").stdout)
    assert waiting["counts"] == {"waiting": 4}
    with campaign_in_background(path, tmp_path) as other:
        done = mgpp(project, "campaign", path, "--json", timeout=600)
        assert done.returncode == 1, done.stderr[-6000:]
        (error,) = json.loads(done.stdout)["errors"]
        assert error.startswith("1 of 4 cells failed")
        assert other.process.wait(timeout=300) == 1, other.log.read_text()[-4000:]
    told = done.stderr + other.log.read_text()
    assert "which is working on it" not in done.stdout
    # What is done was done once; what cannot be, was tried by both.
    assert len(artifacts(tmp_path, "prune")) == 2
    assert len(attempts(tmp_path, "data")) == 1
    assert len(attempts(tmp_path, "dense")) == 1
    for folder in artifacts(tmp_path, "prune"):
        assert len(list((tmp_path / "runs" / folder).glob("a-*"))) == 1, told

    status = json.loads(mgpp(project, "campaign", "status", path, "--json").stdout)
    assert status["counts"] == {"done": 3, "failed": 1}
    (failed,) = (cell for cell in status["cells"] if cell["state"] == "failed")
    assert failed["title"] == "words BROKEN 50% seed 0"
    assert failed["note"]

    (made,) = tmp_path.glob("runs/campaign-*/a-*")
    cells = pandas.read_parquet(made / "cells.parquet")
    evaluated = [m["metrics"] for m in artifacts(tmp_path, "evaluate").values()]
    scores = sorted(m.get("pruned", m.get("dense"))["accuracy"] for m in evaluated)
    assert sorted(cells["metric.accuracy"].dropna()) == scores
    assert (made / "report.html").stat().st_size > 100_000

    again = mgpp(project, "campaign", path, "methods.BROKEN.train.lr=1e-3", timeout=300)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "4 cells, 3 of them done before" in again.stderr


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_a_campaign_whose_driver_is_killed_goes_on_with_what_is_missing(project, tmp_path):
    grid = {"sparsities": [0.5, 0.7], "seeds": [0, 1, 2]}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    undisturbed = mgpp(project, "campaign", write(project, whole, **grid), "--json", timeout=900)
    assert undisturbed.returncode == 0, undisturbed.stderr[-4000:]
    path = write(project, torn, **grid)
    for count in (2, 5):
        with campaign_in_background(path, torn) as campaign:
            deadline = time.monotonic() + 400
            while len(artifacts(torn, "evaluate")) < count:
                assert campaign.process.poll() is None, campaign.log.read_text()[-4000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
        done_before = artifacts(torn, "evaluate")
    resumed = mgpp(project, "campaign", path, "--json", timeout=900)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert f"15 cells, {len(done_before)} of them done before" in resumed.stderr
    after = artifacts(torn, "evaluate")
    assert len(after) == 15
    assert all(after[key] == manifest for key, manifest in done_before.items())
    expected = {(r["method"], r["sparsity"]): r for r in json.loads(undisturbed.stdout)["rows"]}
    for row in json.loads(resumed.stdout)["rows"]:
        assert row["mean"] == expected[row["method"], row["sparsity"]]["mean"]
