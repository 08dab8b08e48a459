"""Campaigns end to end: real Ray, real DeepSpeed, tiny random models, two campaigns on one store."""

import csv
import json
import signal
import time
from pathlib import Path

import pandas
import pytest
import yaml

from pipeline.tracking.recorder import read_records
from tests.html_page import Page
from tests.launch.conftest import mgpp
from tests.launch.runs import HUNG, Driver, last_step
from tests.pipeline.models.word_chains import text
from tests.processes import MGPP
from tests.tiny import write_decoder

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
            "prune.start_from": "dense",
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


def the_table(folder):
    """The folder of the one table that there is."""
    (made,) = folder.glob("runs/campaign-*/a-*")
    return made


def attempts(folder, stage):
    return list(folder.glob(f"runs/{stage}-*/a-*"))


@pytest.mark.timeout(900)
def test_two_campaigns_on_one_store_share_the_work_and_a_failure_stops_neither(project, tmp_path):
    methods = {
        "GMP": {"prune.method": {"name": "gmp"}},
        "BROKEN": {"prune.method": {"name": "gmp"}, "train.lr": 1e30},
    }
    path = write(project, tmp_path, methods=methods)
    with campaign_in_background(path, tmp_path) as other:
        done = mgpp(project, "campaign", path, "--json", timeout=600)
        assert done.returncode == 1, done.stderr[-6000:]
        (error,) = json.loads(done.stdout)["errors"]
        assert error.startswith("1 of 3 runs failed")
        assert other.process.wait(timeout=300) == 1, other.log.read_text()[-4000:]
    logs = done.stderr + other.log.read_text()
    # What is done was done once; what cannot be, was tried by both.
    assert len(artifacts(tmp_path, "prune")) == 1
    assert len(attempts(tmp_path, "data")) == 1
    assert len(attempts(tmp_path, "dense")) == 1
    for folder in artifacts(tmp_path, "prune"):
        assert len(list((tmp_path / "runs" / folder).glob("a-*"))) == 1, logs

    status = json.loads(mgpp(project, "campaign", "status", path, "--json").stdout)
    assert status["counts"] == {"done": 2, "failed": 1}
    (failed,) = (run for run in status["runs"] if run["state"] == "failed")
    assert failed["title"] == "words BROKEN 50% seed 0"
    assert failed["note"]

    made = the_table(tmp_path)
    runs = pandas.read_parquet(made / "runs.parquet")
    evaluated = [m["metrics"] for m in artifacts(tmp_path, "evaluate").values()]
    scores = sorted(m.get("pruned", m.get("dense"))["accuracy"] for m in evaluated)
    assert sorted(runs["metric.accuracy"].dropna()) == scores
    page = Page((made / "report.html").read_text())
    assert page.titles == ["words: accuracy (%)", "words: accuracy (%) against sparsity"]
    for score in scores:
        assert f"{100 * score:.2f}" in page.text
    assert "words BROKEN 50% seed 0" in page.text
    assert " ".join(failed["note"].split()) in " ".join(page.text.split())


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_campaign_that_is_stopped_keeps_the_steps_of_all_its_runs(project, tmp_path, number):
    changes = {
        "cluster.num_workers": 1,
        "zero.stage": 0,
        "train.length": 2000,
        "train.log_every": 1,
        "train.checkpoint_every": 100_000,
        "dense.enabled": False,
    }
    path = write(project, tmp_path, changes=changes)
    with Driver([MGPP, "campaign", path, "--json"], tmp_path / "runs") as campaign:
        for _ in campaign._until(HUNG, "no two runs trained"):
            records = list(tmp_path.glob("runs/prune-*/a-*/metrics.jsonl"))
            if len(records) == 2 and all(last_step(file) >= 3 for file in records):
                break
        campaign.process.send_signal(number)
        code, log = campaign.end(120)
        left = campaign.left_after(10)
    expected, status = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "stopped")}[
        number
    ]
    assert (code, left) == (expected, {}), log[-4000:]
    lines = log.splitlines()
    (line,) = (text for text in lines if text.startswith(f"{status}: "))
    kept = "0 of 2 runs done, the stages and checkpoints of the others"
    assert line.endswith(f"kept: {kept}; rerun the same command to resume from there")
    values = json.loads(lines[-1])
    assert (values["status"], values["kept"]) == (status, kept)
    assert "Traceback" not in log
    assert "SIGABRT" not in log
    assert len(list(tmp_path.glob("runs/prune-*/checkpoints/step-*/_DONE.json"))) == 2
    assert not list(tmp_path.glob("runs/*/_LEASE*"))


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
    assert f"15 runs, {len(done_before)} of them cached" in resumed.stderr
    after = artifacts(torn, "evaluate")
    assert len(after) == 15
    assert all(after[key] == manifest for key, manifest in done_before.items())
    expected = {(r["method"], r["sparsity"]): r for r in json.loads(undisturbed.stdout)["rows"]}
    for row in json.loads(resumed.stdout)["rows"]:
        assert row["mean"] == expected[row["method"], row["sparsity"]]["mean"]


def test_the_old_command_names_the_new_one(project):
    done = mgpp(project, "compare", "some.yaml", "--json", timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: mgpp compare: no longer a command; use `mgpp campaign FILE`\n"


def test_a_bad_file_is_one_error_and_starts_nothing(project, tmp_path):
    path = write(project, tmp_path, runs_at_once=0)
    done = mgpp(project, "campaign", path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: runs_at_once: input should be greater than or equal to 1, got 0\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def chosen_campaign(tmp_path_factory):
    """A campaign of one recipe, a causal language model's, whose method has two candidates."""
    folder = tmp_path_factory.mktemp("chosen")
    write_decoder("gpt2", folder / "model")
    (folder / "train.txt").write_text("\n".join(text(40, 2 * i) for i in range(48)))
    recipe = {
        "name": "tiny-lm",
        "model": {"path": str(folder / "model")},
        "task": {"type": "causal-lm", "max_length": 16},
        "data": {"source": "files", "train": str(folder / "train.txt"), "validation_share": 0.5},
        "train": {"length": 4, "batch_size": 8, "lr": 0.002},
        "dense": {"enabled": False},
        "prune": {"sparsity": 0.5, "start_after": 1, "finetune": 1, "interval": 1},
        "zero": {"stage": 0},
        "cluster": {"num_workers": 1},
    }
    campaign = {
        "name": "tiny",
        "storage": str(folder / "runs"),
        "recipe": "recipe.yaml",
        "selection": {"changes": {"data.split_seed": 1}},
        "methods": {
            "GMP": {
                "changes": {"prune.method": {"name": "gmp"}},
                "candidates": [{}, {"train.lr": 1e-6}],
            },
        },
        "sparsities": [0.5],
        "curves": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = folder / "campaign.yaml"
    path.write_text(yaml.safe_dump(campaign))
    return folder, str(path)


@pytest.fixture(scope="module")
def chosen(project, chosen_campaign):
    _, path = chosen_campaign
    before = json.loads(mgpp(project, "campaign", "status", path, "--json").stdout)
    done = mgpp(project, "campaign", path, "--json")
    assert done.returncode == 0, done.stderr[-6000:]
    return before, json.loads(done.stdout), done.stderr


def test_the_table_holds_what_the_runs_evaluated_to(chosen, chosen_campaign):
    _, result, _ = chosen
    assert [row["method"] for row in result["rows"]] == ["dense", "GMP"]
    evaluations = artifacts(chosen_campaign[0], "evaluate").values()
    assert len(evaluations) == 2 + 2
    scores = [evaluation["metrics"] for evaluation in evaluations]
    (value,) = result["rows"][1]["values"]
    assert value in {metrics["pruned"]["perplexity"] for metrics in scores if "pruned" in metrics}
    assert result["rows"][0]["values"] == [m["dense"]["perplexity"] for m in scores if "dense" in m]


def test_a_perplexity_is_written_as_it_is(chosen):
    _, result, stderr = chosen
    values = [row["mean"] for row in result["rows"]]
    assert all(1 < value < 2000 for value in values)  # some words guessed among 30
    made = Path(result["url"])
    assert list(pandas.read_parquet(made / "summary.parquet")["mean"]) == values
    table = (made / "summary.md").read_text()
    assert "**perplexity**" in table
    assert f"| GMP | {values[1]:,.2f} |" in table
    assert f"perplexity {values[1]:,.2f}" in stderr
    assert f"{values[1]:,.2f}" in Page((made / "report.html").read_text()).text


def test_the_candidate_that_scored_best_was_chosen(chosen):
    _, result, _ = chosen
    assert [row["candidate"] for row in result["selection"]] == [1, 2]
    best = min(result["selection"], key=lambda row: row["value"])  # of perplexities
    assert [row["chosen"] for row in result["selection"]] == [
        row is best for row in result["selection"]
    ]
    assert result["rows"][1]["settings"] == best["settings"]


def test_tables_curves_and_page_are_written_and_progress_is_logged(chosen):
    _, result, stderr = chosen
    folder = Path(result["url"])
    tables = ("runs", "summary", "selection", "curves")
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.{suffix}" for name in tables for suffix in ("csv", "parquet")),
        "summary.md",
        "report.html",
    }
    with (folder / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    trained = [
        [r["loss"] for r in read_records(path)["step"]]
        for path in folder.parent.parent.glob("prune-*/a-*/metrics.jsonl")
    ]
    assert len(trained) == 2 + 1
    assert [float(point["loss"]) for point in points] in trained
    page = Page((folder / "report.html").read_text())
    assert "GMP 50% candidate 2 seed 0" in page.text
    assert "tiny: training loss" in page.titles
    assert "2 runs, 0 of them cached" in stderr
    assert "GMP 50% candidate 1 seed 0: perplexity" in stderr


def test_status_waits_for_the_choice_and_then_knows_it(chosen, chosen_campaign, project):
    before, _, _ = chosen
    assert before["counts"] == {"waiting": 4}
    notes = {run["title"]: run["note"] for run in before["runs"]}
    assert notes["GMP 50% seed 0"] == "its settings are not chosen yet"
    after = json.loads(mgpp(project, "campaign", "status", chosen_campaign[1], "--json").stdout)
    assert after["counts"] == {"done": 4}


def test_runs_that_are_done_are_not_run_again(chosen, chosen_campaign, project):
    folder, path = chosen_campaign
    lost = next((folder / "runs").glob("campaign-*")) / "_DONE.json"
    lost.unlink()
    again = mgpp(project, "campaign", path, "--json", timeout=120)
    assert again.returncode == 0, again.stderr[-4000:]
    assert json.loads(again.stdout)["rows"] == chosen[1]["rows"]
    assert again.stderr.count("2 runs, 2 of them cached") == 2  # of the selection, of the table


@pytest.mark.torture
def test_a_run_of_the_selection_that_fails_does_not_stop_the_others(chosen_campaign, project):
    folder, path = chosen_campaign
    values = yaml.safe_load(Path(path).read_text())
    values["methods"]["broken"] = {
        "changes": {"train.lr": 1e30, "prune.method": {"name": "gmp"}},
        "candidates": [{}, {}],
    }
    (folder / "broken.yaml").write_text(yaml.safe_dump(values))
    done = mgpp(project, "campaign", str(folder / "broken.yaml"), "--json", timeout=240)
    assert done.returncode == 1
    (error,) = json.loads(done.stdout)["errors"]
    assert error.startswith(("1 of 4 runs failed", "2 of 4 runs failed"))
    assert "broken 50% candidate 1" in error
