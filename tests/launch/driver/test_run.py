"""The command line end to end: real Ray, real DeepSpeed, real processes, a tiny random BERT."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.html_page import Page
from tests.launch.conftest import ONE_GPU, mgpp
from tests.processes import run

pytestmark = pytest.mark.distributed


def test_the_run_makes_every_artifact(summary):
    stages = ["data", "dense", "prune", "evaluate", "export", "report"]
    assert list(summary["artifacts"]) == stages
    assert summary["status"] == "done"
    assert summary["cached"] == []
    assert all(summary["seconds"][stage] > 0 for stage in stages)
    assert set(summary["metrics"]) == {"dense", "pruned"}
    for metrics in summary["metrics"].values():
        assert set(metrics) == {"accuracy", "f1", "matthews"}


def test_a_run_on_cpus_ends_well_where_torch_sees_a_gpu(first_run, summary):
    seen = "import torch; print(torch.cuda.is_available(), torch.cuda.device_count())"
    assert run([sys.executable, "-c", seen], timeout=60, env=ONE_GPU).stdout == "True 1\n"
    assert "workers   2 workers of 1 CPU core each, fp32\n" in first_run.stderr
    assert summary["status"] == "done"


def test_the_exported_files_hold_exactly_the_sparsity_that_is_reported(summary):
    tensors = load_file(Path(summary["model"]) / "model.safetensors")
    prunable = [
        t for n, t in tensors.items() if ".layer." in n and n.endswith("weight") and t.dim() == 2
    ]
    total = sum(t.numel() for t in prunable)
    zeros = sum(int((t == 0).sum()) for t in prunable)
    assert total == 3 * (4 * 20 * 20 + 2 * 20 * 36)
    assert zeros == int(total * 0.8)
    assert summary["sparsity"] == zeros / total
    config = json.loads((Path(summary["model"]) / "config.json").read_text())
    assert config["pruning_config"]["num_pruned"] == zeros


def test_the_exported_model_loads_and_scores_as_reported(summary, project):
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(summary["model"]).eval()
    assert AutoTokenizer.from_pretrained(summary["model"]).vocab_size == 105
    rows = load_from_disk(str(Path(summary["artifacts"]["data"]) / "dataset"))["validation"]
    right = 0
    with torch.inference_mode():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
            right += int(logits.argmax()) == row["labels"]
    # A near tie may fall either way in another batch.
    assert abs(right / len(rows) - summary["metrics"]["pruned"]["accuracy"]) <= 2 / len(rows)


def test_records_progress_and_report_are_there(summary, first_run):
    folder = Path(summary["artifacts"]["prune"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    prunings = [r for r in records if r["event"] == "prune"]
    assert [r["step"] for r in prunings] == [4, 8, 12, 16, 17]
    assert prunings[-1]["num_pruned"] == int(9120 * 0.8)
    assert list((folder / "tensorboard").glob("events.*"))
    page = Page(Path(summary["report"]).read_text())
    assert "80.00%" in page.text
    assert "tiny" in page.text
    assert f"{100 * summary['metrics']['pruned']['accuracy']:.2f}%" in page.text
    assert "prune" in first_run.stderr
    assert "step 24/24" in first_run.stderr


def test_a_second_run_finds_everything_done(summary, project):
    again = mgpp(project, "run", str(project / "run.yaml"), "--json", timeout=120)
    assert again.returncode == 0, again.stderr[-4000:]
    result = json.loads(again.stdout)
    assert result["cached"] == list(result["artifacts"])
    assert result["artifacts"] == summary["artifacts"]
    assert result["metrics"] == summary["metrics"]


def test_changing_only_the_evaluation_reruns_what_follows_from_it(summary, project):
    changes = ["evaluate.max_rows=40", "cluster.num_workers=1"]  # the latter is nothing to them
    changed = mgpp(project, "run", str(project / "run.yaml"), *changes, "--json")
    assert changed.returncode == 0, changed.stderr[-4000:]
    result = json.loads(changed.stdout)
    assert result["cached"] == ["data", "dense", "prune"]
    assert result["artifacts"]["prune"] == summary["artifacts"]["prune"]


def test_show_describes_an_artifact(summary, project):
    shown = mgpp(project, "show", summary["artifacts"]["prune"], "--json", timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["metrics"]["num_pruned"] == int(9120 * 0.8)


def test_bad_input_is_told_at_once_and_nothing_is_written(project, tmp_path):
    done = mgpp(
        project,
        "run",
        str(project / "run.yaml"),
        f"storage={tmp_path}/none",
        "task.label=lable",
        "prune.include=['nothing.*']",
        "cluster.num_workers=1000",
        "train.batch_size=16000",
        "--json",
        timeout=120,
    )
    assert done.returncode == 2
    found = json.loads(done.stdout)
    errors = found["errors"]
    assert {"task.label", "cluster.num_workers"} <= {p["key"] for p in found["problems"]}
    for key in ("task.label", "prune.include", "cluster.num_workers"):
        assert any(error.startswith(key) for error in errors), (key, errors)
    assert not (tmp_path / "none").exists()


def test_version(project):
    from mgpp import __version__

    assert mgpp(project, "--version", timeout=60).stdout.strip() == f"mgpp {__version__}"
