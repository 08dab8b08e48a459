"""`mgpp push`: what arrives at the hub, what is resumed, what is refused."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from launch.cli.main import app
from pipeline.store.artifacts import ArtifactStore
from tests import tiny
from tests.hub_server import hub_server, online
from tests.processes import ROOT

TOKEN = "hf_secretsecretsecret"
CARD = "---\nlibrary_name: transformers\ntags: [mgpp, sparse]\n---\n\n# tiny\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server() as server:
        online(server, tmp_path / "cache", monkeypatch)
        server.folder, server.writers = tmp_path / "hub", {TOKEN}
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "plain")


def write(folder, sparsity=0.9, **settings):
    model = tiny.model(BertForSequenceClassification, hidden_size=64, intermediate_size=128)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape) < sparsity] = 0
    model.save_pretrained(folder, **settings)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def push(*arguments):
    done = CliRunner().invoke(app, ["push", *map(str, arguments)], catch_exceptions=False)
    assert TOKEN not in done.output
    return done


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def on_the_hub(hub, name="me/tiny"):
    found = files_of(list(hub.commits["models", name].values())[-1])
    return {name: content for name, content in found.items() if name != ".gitattributes"}


def refused(done, *texts):
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    for text in texts:
        assert text in line
    return line


def test_a_folder_arrives_as_it_is(hub, checkpoint):
    done = push(checkpoint, "me/tiny", "--private", "--message", "first")
    assert done.exit_code == 0, done.output
    assert on_the_hub(hub) == files_of(checkpoint)
    assert hub.private == {"me/tiny"}
    assert hub.messages == ["first"]
    size = sum(map(len, files_of(checkpoint).values()))
    assert f"{hub.url}/me/tiny: 3 files, {size / 1e6:.1f} MB; commit " in done.stdout


def test_what_arrived_already_is_not_sent_again(hub, checkpoint, capfd):
    push(checkpoint, "me/tiny")
    capfd.readouterr()
    push(checkpoint, "me/tiny", "--json")
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["status"] == "pushed"
    assert found["commit"] is None
    assert found["url"] == f"{hub.url}/me/tiny"
    assert len(hub.uploaded) == len(hub.messages) == 1


def test_other_content_is_replaced_only_when_that_is_asked_for(hub, checkpoint, tmp_path):
    other = write(tmp_path / "other", sparsity=0.5, max_shard_size="60KB")
    push(other, "me/tiny")
    before = on_the_hub(hub)
    assert before == files_of(other)
    line = refused(push(checkpoint, "me/tiny"), "REPO: 'me/tiny' exists and holds other files")
    assert line.endswith("choose another name, or replace them with --update")
    assert on_the_hub(hub) == before
    assert push(checkpoint, "me/tiny", "--update").exit_code == 0
    assert on_the_hub(hub) == files_of(checkpoint)  # no shard of the other is left to be loaded


@pytest.mark.parametrize("kind", ["model", "packed"])
def test_an_artifact_is_checked_before_it_is_sent(hub, tmp_path, kind):
    store = ArtifactStore(str(tmp_path / "store"))
    attempt = store.begin("export", "0" * 16, {}, {})
    write(attempt.folder / "model")
    folders = [str(attempt.folder / name) for name in ("model", "packed")]
    assert CliRunner().invoke(app, ["pack", *folders]).exit_code == 0
    artifact = attempt.commit({}, 1.0)
    done = push(artifact.url, "me/tiny", *([] if kind == "model" else ["--format", "packed"]))
    assert done.exit_code == 0, done.output
    assert on_the_hub(hub) == files_of(artifact.path / kind)
    refused(push(artifact.url, "me/x", "--format", "onnx"), "ARTIFACT: has no folder 'onnx'")
    weights = artifact.path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = push(weights.parent, "me/damaged")
    assert done.exit_code == 1
    assert "model/model.safetensors" in done.stderr
    assert ("models", "me/damaged") not in hub.commits


@pytest.mark.slow
@pytest.mark.distributed
def test_an_upload_that_was_killed_is_resumed(hub, tmp_path):
    folder = write(tmp_path / "plain", max_shard_size="60KB")
    shards = len(list(folder.glob("*.safetensors")))
    reached, release, lock = threading.Event(), threading.Event(), threading.Lock()

    def hold(number):
        if number == 1:
            return
        with lock:
            reached.set()
        release.wait(60)
        raise ConnectionError

    hub.hold = hold
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    script = "from launch.cli.main import main; main()"
    command = [sys.executable, "-c", script, "push", str(folder), "me/tiny"]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE)
    assert reached.wait(120)
    while not hub.uploaded:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    hub.hold = lambda number: None
    release.set()
    assert not on_the_hub(hub)  # nothing by halves
    (first,) = hub.uploaded
    done = push(folder, "me/tiny")
    assert done.exit_code == 0, done.output
    assert on_the_hub(hub) == files_of(folder)
    assert hub.uploaded.count(first) == 1
    assert len(hub.uploaded) == shards > 2


# What is refused.


def test_no_token(hub, checkpoint, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(push(checkpoint, "me/tiny"), "HF_TOKEN: there is no token", "`hf auth login`")


def test_a_login_is_enough(hub, checkpoint, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    path = tmp_path / "token"
    path.write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path))
    assert push(checkpoint, "me/tiny").exit_code == 0


def test_a_token_that_may_only_read(hub, checkpoint):
    hub.writers = set()
    refused(push(checkpoint, "me/tiny"), "HF_TOKEN: ", "answered 403", "may not write to 'me/tiny'")


def test_a_token_that_is_not_valid(hub, checkpoint):
    hub.answers = [401]
    refused(push(checkpoint, "me/tiny"), "HF_TOKEN: ", "answered 401: the token is not valid")


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/..", "me/a b"])
def test_names_that_are_none(hub, checkpoint, name):
    refused(push(checkpoint, name), "REPO: ", f"got {name!r}", "allowed are OWNER/NAME")


def test_offline_mode(hub, checkpoint, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(push(checkpoint, "me/tiny"), "HF_HUB_OFFLINE: is set", "unset it")


def test_no_hub_there(hub, checkpoint, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(push(checkpoint, "me/tiny"), "the hub at http://127.0.0.1:9 was not reached")


def test_a_public_repository_does_not_become_private(hub, checkpoint):
    push(checkpoint, "me/tiny")
    refused(push(checkpoint, "me/tiny", "--private"), "--private: 'me/tiny' exists and is public")


def test_what_is_no_checkpoint(hub, tmp_path, checkpoint):
    refused(push(tmp_path / "nowhere", "me/tiny"), "ARTIFACT: here is neither a checkpoint")
    (tmp_path / "empty").mkdir()
    refused(push(tmp_path / "empty", "me/tiny"), "is no checkpoint: it has no config.json")
    (checkpoint / "model.safetensors").unlink()
    refused(push(checkpoint, "me/tiny"), "has neither model.safetensors nor")
    assert not hub.commits


def test_a_card_whose_metadata_is_damaged(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\ntags: [mgpp\n---\n", encoding="utf-8")
    refused(push(checkpoint, "me/tiny"), "README.md: its metadata cannot be read")
    assert not hub.commits


def test_the_pushed_weights_load(hub, checkpoint, tmp_path):
    push(checkpoint, "me/tiny")
    path = tmp_path / "w.safetensors"
    path.write_bytes(on_the_hub(hub)["model.safetensors"])
    want, found = load_file(checkpoint / "model.safetensors"), load_file(path)
    assert all(torch.equal(want[name], found[name]) for name in want)
