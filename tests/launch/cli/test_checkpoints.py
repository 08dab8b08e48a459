"""`mgpp pack` and `mgpp unpack`: what they print, what they make, what they refuse."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from launch.cli.main import app
from mgpp.sparse.zeros import by_pattern, count_zeros
from pipeline.store.artifacts import ArtifactStore
from tests import tiny


def write(folder, sparsity=0.9):
    model = tiny.model(BertForSequenceClassification, hidden_size=64, intermediate_size=128)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape) < sparsity] = 0
    model.save_pretrained(folder)
    return folder


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def test_a_folder_is_packed_and_unpacked(tmp_path):
    plain, packed, again = write(tmp_path / "plain"), tmp_path / "packed", tmp_path / "again"
    done = invoke("pack", plain, packed)
    assert done.exit_code == 0
    before, after = size_of(plain), size_of(packed)
    assert f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after" in done.stdout
    assert f"packed is {before / after:.2f} times smaller" in done.stdout
    done = invoke("unpack", packed, again)
    assert f"{after / 1e6:.1f} MB before, {before / 1e6:.1f} MB after" in done.stdout
    want, found = (load_file(folder / "model.safetensors") for folder in (plain, again))
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)


def test_json_says_the_same(tmp_path, capfd):
    plain, packed = write(tmp_path / "plain"), tmp_path / "packed"
    invoke("pack", plain, packed, "--json")
    (line,) = capfd.readouterr().out.splitlines()
    found = json.loads(line)
    weights = found.pop("weights")
    assert "classifier.weight" not in weights
    assert "bert.encoder.layer.0.attention.self.query.weight" in weights
    assert found == {
        "status": "packed",
        "path": str(packed),
        "plain_bytes": size_of(plain),
        "packed_bytes": size_of(packed),
        "ratio": size_of(plain) / size_of(packed),
    }


def test_what_an_export_made_is_found_in_its_artifact(tmp_path, url):
    store = ArtifactStore(url)
    attempt = store.begin("export", "0" * 16, {}, {})
    write(attempt.folder / "model")
    invoke("pack", attempt.folder / "model", attempt.folder / "packed")
    artifact = attempt.commit({}, 1.0)
    for number, given in enumerate((artifact.url, f"{artifact.url}/model")):
        assert invoke("pack", given, tmp_path / f"packed-{number}").exit_code == 0
    for number, given in enumerate((artifact.url, f"{artifact.url}/packed")):
        assert invoke("unpack", given, tmp_path / f"again-{number}").exit_code == 0
    assert size_of(tmp_path / "again-1") > size_of(tmp_path / "packed-1")


def exported(folder):
    """Write a model with the note that an export leaves."""
    write(folder)
    zeros = by_pattern(count_zeros(folder))
    noted = {name: zeros[name].zeros for name in zeros if ".layer." in name}
    config = json.loads((folder / "config.json").read_text())
    config["pruning_config"] = {"zeros": noted}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(noted.values())


@pytest.mark.parametrize("packed", [False, True])
def test_check_counts_zeros_by_matrix(tmp_path, packed, capfd):
    total = exported(tmp_path / "plain")
    folder = tmp_path / "plain"
    if packed:
        folder = tmp_path / "packed"
        invoke("pack", tmp_path / "plain", folder)
    done = invoke("check", folder)
    assert done.exit_code == 0
    assert f"{total:,} of the {total:,} zeros of the export are there" in done.stdout
    capfd.readouterr()
    invoke("check", folder, "--json")
    found = json.loads(capfd.readouterr().out)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert found["status"] == "kept"
    assert found["zeros"] == {
        name: {"matrices": 1, "zeros": int((t == 0).sum()), "numel": t.numel()}
        for name, t in tensors.items()
        if t.dim() > 1
    }


@pytest.mark.parametrize("saved", ["whole", "base model"])
def test_zeros_that_a_later_tool_lost_are_found(tmp_path, saved):
    exported(tmp_path / "plain")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "plain")
    weight = model.bert.encoder.layer[1].output.dense.weight
    lost = int((weight == 0).sum())
    with torch.no_grad():
        weight += 1e-3  # what training without the mask does
    (model if saved == "whole" else model.bert).save_pretrained(tmp_path / "tuned")
    done = invoke("check", tmp_path / "tuned")
    assert done.exit_code == 1
    name = "bert.encoder.layer.*.output.dense.weight"
    assert done.stderr == f"error: {lost:,} zeros are lost, in {name}\n"


def test_check_says_where_there_is_nothing_to_compare(tmp_path):
    done = invoke("check", write(tmp_path / "plain"))
    assert done.exit_code == 0
    assert "nothing to compare" in done.stdout


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pack nowhere out", "FOLDER: here is neither a checkpoint (config.json) nor a finished"),
        ("pack nope://x out", "FOLDER: Protocol not known: nope"),
        ("pack package:nope/x out", "FOLDER: package:nope/x: package 'nope' is not installed"),
        ("pack plain plain", "OUTPUT: exists already, got 'plain'"),
        ("pack plain plain/packed", "FOLDER: plain/packed lies in plain"),
        ("unpack plain out", "FOLDER: plain is not packed"),
        ("check nowhere", "FOLDER: here is neither a checkpoint (config.json) nor a finished"),
        ("pack dense out", "FOLDER: dense has no matrix with so many zeros"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, monkeypatch, command, line):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "plain")
    write(tmp_path / "dense", sparsity=0.0)
    done = invoke(*command.split())
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "plain"]
