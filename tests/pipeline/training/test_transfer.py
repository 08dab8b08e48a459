"""Two steps: a model is pruned upstream, then trained on a task of other labels with its zeros kept."""

import json
import re
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.store.artifacts import open_artifact
from pipeline.tracking.recorder import read_records
from tests.cases import launch_cases
from tests.html_page import Page
from tests.pipeline.training.transfer_worker import CASES, RESUMED

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tiny_bert, words_csv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    shutil.copytree(tiny_bert, folder / "bert")
    rows = words_csv.read_text().splitlines()
    # Another task on the same texts: three labels, by the word's length.
    words = [(row.split(",")[0], len(row) % 3) for row in rows[1:]]
    (folder / "lengths.csv").write_text("\n".join(["text,label", *(f"{a},{b}" for a, b in words)]))
    common = {
        "storage": str(folder / "runs"),
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 8},
        "train": {"length": 12, "batch_size": 8, "lr": 0.002, "log_every": 4},
        "cluster": {"num_workers": 2},
    }
    upstream = {
        **common,
        "name": "upstream",
        "model": {"path": str(folder / "bert")},
        "data": {"source": "files", "train": str(words_csv), "validation_share": 0.25},
        "dense": {"enabled": False},
        "prune": {"sparsity": 0.6, "start_after": 2, "finetune": 2, "interval": 2},
    }
    transfer = {
        **common,
        "name": "downstream",
        "model": {"path": f"run:{folder / 'upstream.yaml'}"},
        "data": {
            "source": "files",
            "train": str(folder / "lengths.csv"),
            "validation_share": 0.25,
        },
        "dense": {"enabled": False},
        "prune": {"method": {"name": "sparse-transfer"}},
    }
    for name, values in (("upstream", upstream), ("transfer", transfer)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (folder / "out").mkdir()
    files = (str(folder / "upstream.yaml"), str(folder / "transfer.yaml"), str(folder / "out"))
    return launch_cases(
        "tests.pipeline.training.transfer_worker",
        *files,
        cases=CASES,
        folder=folder / "out",
        num_processes=1,
        timeout=300,
    )


@pytest.fixture
def found(launched):
    return json.loads((launched.folder("both") / "found.json").read_text())


def model_of(url):
    return load_file(f"{url}/model/model.safetensors")


def test_the_second_step_asks_for_the_first(found):
    (problem,) = found["before"]
    assert problem.startswith("model.path: 'run:")
    assert "was not run yet" in problem
    assert "`mgpp run " in problem
    assert "upstream.yaml` first" in problem
    assert found["path"] == f"{found['upstream']['export']}/model"
    assert len(set(found["keys"])) == 5


def test_the_export_has_the_zeros_of_the_upstream_model_and_no_others(found):
    before, after = model_of(found["upstream"]["export"]), model_of(found["transfer"]["export"])
    prunable = [name for name in before if ".layer." in name and before[name].dim() == 2]
    assert len(prunable) == 12
    num_zeros = sum(int((before[name] == 0).sum()) for name in prunable)
    num_prunable = sum(before[name].numel() for name in prunable)
    assert num_zeros == int(0.6 * num_prunable)
    for name in prunable:
        assert ((before[name] == 0) == (after[name] == 0)).all(), name
        assert (before[name] != after[name]).any(), name
    # The head is of three labels, so it is new; it is not pruned.
    assert before["classifier.weight"].shape[0] == 2
    assert after["classifier.weight"].shape[0] == 3
    assert (after["classifier.weight"] != 0).all()
    figures = open_artifact(found["transfer"]["prune"]).metrics
    exported = open_artifact(found["transfer"]["export"]).metrics
    assert figures["num_pruned"] == figures["num_zeros"] == exported["num_zeros"] == num_zeros
    assert figures["sparsity"] == exported["sparsity"] == num_zeros / num_prunable
    upstream = open_artifact(found["upstream"]["prune"]).metrics
    assert figures["mask_hash"] == upstream["mask_hash"]


def test_records_card_and_report_tell_of_the_two_steps(found):
    folder = found["transfer"]["export"]
    with open(f"{folder}/model/config.json", encoding="utf-8") as file:
        pruning = json.load(file)["pruning_config"]
    assert pruning["method"] == {"name": "sparse-transfer"}
    assert pruning["upstream"]["method"]["name"] == "mgpp"
    assert pruning["upstream"]["mask_hash"] == pruning["mask_hash"]
    with open(f"{folder}/model/README.md", encoding="utf-8") as file:
        card = file.read()
    assert "pruned by MGPP" in card
    assert "what was zero before the first stayed zero" in card
    records = read_records(open_artifact(found["transfer"]["prune"]).path / "metrics.jsonl")
    assert {record["phase"] for record in records["step"]} == {"fixed mask"}
    assert {record["mask_sparsity"] for record in records["step"]} == {pruning["sparsity"]}
    assert [record["step"] for record in records["prune"]] == [0]
    assert len(records["layers"][0]["sparsity"]) == 12
    with open(f"{found['transfer']['report']}/report.html", encoding="utf-8") as file:
        page = Page(file.read())
    assert "Sparse transfer" in page.text
    assert "Sparsity by layer and matrix" in page.titles


@pytest.mark.parametrize("layout", RESUMED)
def test_a_resumed_run_ends_as_the_whole(launched, layout):
    out = launched.folder("both", "whole", layout)
    whole, resumed = model_of(out / "whole"), model_of(out / layout)
    for name, weight in whole.items():
        if layout == "stage2":
            assert (weight == resumed[name]).all(), name
        elif ".layer." in name and weight.dim() == 2:  # ranks draw another dropout there
            assert ((weight == 0) == (resumed[name] == 0)).all(), name
    figures = json.loads((out / layout / "figures.json").read_text())
    assert figures["num_zeros"] == figures["num_pruned"] > 0


def test_a_model_that_was_not_pruned_is_refused(launched):
    refused = json.loads((launched.folder("both", "refused") / "refused.json").read_text())
    by_transfer, further, too_far = refused
    assert by_transfer.startswith("prune.method: 0 of the ")
    assert further.startswith("prune.keep_zeros: 0 of the ")
    assert "no mask to keep" in by_transfer
    assert "no mask to keep" in further
    assert too_far.startswith("prune.keep_zeros: ")
    zeros, total, least = (int(n) for n in re.findall(r"(\d+) (?:of|weights|are to be)", too_far))
    assert (zeros, least) == (int(0.6 * total), int(0.5 * total))


def test_pruned_further_the_zeros_stay_and_a_resumed_run_ends_as_the_whole(launched, found):
    out = launched.folder("both", "further")
    before = model_of(found["upstream"]["export"])
    whole, resumed = model_of(out / "further"), model_of(out / "further-resumed")
    prunable = [name for name in before if ".layer." in name and before[name].dim() == 2]
    for name, weight in whole.items():
        assert (weight == resumed[name]).all(), name
    for name in prunable:
        assert not whole[name][before[name] == 0].any(), name
    num_zeros = sum(int((whole[name] == 0).sum()) for name in prunable)
    assert num_zeros == int(0.8 * sum(whole[name].numel() for name in prunable))
    figures = json.loads((out / "further-resumed" / "figures.json").read_text())
    assert figures["num_zeros"] == figures["num_pruned"] == num_zeros
    records = read_records(out / "further-resumed" / "metrics.jsonl")["prune"]
    pruned = [record["num_pruned"] for record in records]
    least = sum(int((before[name] == 0).sum()) for name in prunable)
    assert [record["step"] for record in records][:2] == [
        0,
        3,
    ]  # the start's zeros, the first pruning
    assert pruned[0] == pruned[1] == least  # which asks for 20% of the weights
    assert pruned == sorted(pruned)
