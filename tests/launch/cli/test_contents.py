"""The command line and what files hold: an edited manifest, an old store, a model read once."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import BertModel
from typer.testing import CliRunner

from launch.cli.main import app
from pipeline.store.artifacts import ArtifactStore
from tests import tiny
from tests.processes import ROOT
from tests.run_file import write_run

KEY = "0123456789abcdef"


@pytest.fixture
def artifact(tmp_path):
    attempt = ArtifactStore(str(tmp_path / "runs")).begin("evaluate", KEY, {}, {})
    (attempt.folder / "rows.txt").write_text("abc")
    return attempt.commit({"pruned": {"accuracy": 0.5}}, 1.0)


def rewrite(artifact, change):
    """Change a manifest by hand."""
    path = artifact.path.parent / "_DONE.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_an_edited_metric_is_not_shown(artifact):
    assert "accuracy: 0.5" in invoke("show", artifact.url).output
    rewrite(artifact, lambda values: values["metrics"]["pruned"].update(accuracy=0.99))
    done = invoke("show", artifact.url)
    assert done.exit_code == 2
    assert "_DONE.json is damaged: it was changed after it was written" in done.output
    assert "0.99" not in done.output


def test_a_manifest_of_an_earlier_version_is_used_and_counted(artifact, tmp_path):
    def older(values):
        del values["format"], values["checksum"]
        digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc"
        values["files"]["rows.txt"] = {"bytes": 3, "sha256": digest}

    rewrite(artifact, older)
    assert "accuracy: 0.5" in invoke("show", artifact.url).output
    done = invoke("store", "verify", str(tmp_path / "runs"))
    assert done.exit_code == 0
    assert "1 artifacts match their checksums" in done.output
    assert "1 of them are of an earlier version" in " ".join(done.output.split())
    (artifact.path / "rows.txt").write_text("abd")
    assert invoke("store", "verify", str(tmp_path / "runs")).exit_code == 1


VALIDATE = """
import atexit, sys
from pathlib import Path
from launch.cli.main import main
output = sys.argv.pop()
atexit.register(lambda: Path(output).write_text(Path("/proc/self/io").read_text()))
main()
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_an_unchanged_model_of_500_mb_is_not_read_again(tiny_bert, words_csv, tmp_path):
    configs = {}
    for name in ("small", "large"):
        folder = tmp_path / name
        shutil.copytree(tiny_bert, folder / "model")
        if name == "large":
            write_large(folder / "model")
        for path in (folder / "model").iterdir():
            os.utime(path, (1_700_000_000, 1_700_000_000))
        configs[name] = write_run(folder, folder / "model", words_csv, zero={"precision": "fp32"})
    # What imports read is in all three.
    small = bytes_read(configs["small"], tmp_path / "io")
    first, again = (bytes_read(configs["large"], tmp_path / "io") - small for _ in range(2))
    assert first > 500e6
    assert abs(again) < 1e6, f"{again:,} bytes"


def write_large(folder):
    """Put 512 MB of weights into a model's folder: a larger vocabulary, all zeros."""
    settings = tiny.config(
        "bert", vocab_size=8_000_000, intermediate_size=32, max_position_embeddings=32
    )
    with torch.device("meta"):
        model = BertModel(settings)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for values in model.state_dict(keep_vars=True).values():
            values.zero_()
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 500e6


def bytes_read(config, output):
    """Return what `mgpp validate` reads, in bytes, by the kernel's count."""
    command = [sys.executable, "-c", VALIDATE, "validate", str(config), str(output)]
    done = subprocess.run(
        command, cwd=ROOT, timeout=300, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(line.split(": ") for line in output.read_text().splitlines())
    return int(counts["rchar"])
