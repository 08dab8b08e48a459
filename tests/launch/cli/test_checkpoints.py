"""`mgpp pack` and `mgpp unpack`: what they print, what they make, what they refuse."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from launch.cli.main import app
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


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pack nowhere out", "FOLDER: here is neither a checkpoint (config.json) nor a finished"),
        ("pack nope://x out", "FOLDER: Protocol not known: nope"),
        ("pack package:nope/x out", "FOLDER: package:nope/x: package 'nope' is not installed"),
        ("pack plain plain", "OUTPUT: exists already, got 'plain'"),
        ("pack plain plain/packed", "FOLDER: plain/packed lies in plain"),
        ("unpack plain out", "FOLDER: plain is not packed"),
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
