"""Models of the hub are on a node before its workers start together: each file is downloaded once."""

import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest

from launch.workers.controller import WorkerGroupConfig, _Backend
from launch.workers.prefetch import prefetch
from pipeline.storage.filesystems import open_storage
from pipeline.storage.node_copies import release, remove_unused
from pipeline.store.artifacts import ArtifactStore
from tests.hub_server import hub_server
from tests.processes import ROOT

LOAD = "import sys; from launch.workers.prefetch import prefetch; prefetch([{'path': 'org/model'}])"


@pytest.mark.slow
def test_the_workers_of_a_node_download_each_file_once(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "model")
    for other in ("pytorch_model.bin", "tf_model.h5", "model.onnx"):
        (tmp_path / "model" / other).write_bytes(b"of another library")
    with hub_server() as hub:
        hub.add("models", "org/model", tmp_path / "model")
        env = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        workers = [subprocess.Popen([sys.executable, "-c", LOAD], env=env) for _ in range(3)]
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
        needed = {path.name for path in tiny_bert.iterdir()}
        assert sorted(hub.sent) == sorted(needed)
        # The load that follows sends for no file.
        load = (
            "from pipeline.models.loading import load_tokenizer, load_model\n"
            "from pipeline.models.source import ModelConfig\n"
            "import torch\nconfig = ModelConfig(path='org/model')\nload_tokenizer(config)\n"
            "load_model(config, 'AutoModelForMaskedLM', model_kwargs={}, dtype=torch.float32, seed=0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", load], env=env, timeout=120, check=False, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        assert sorted(hub.sent) == sorted(needed)


def test_a_download_that_fails_is_left_to_the_load(caplog, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("pipeline.models.source.fetch", fail)
    prefetch([{"path": "org/model"}])
    assert "org/model was not fetched: no network" in caplog.text


def test_artifacts_are_fetched_and_a_damaged_one_is_left_to_the_stage(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("MGPP_CACHE", str(tmp_path))
    attempt = ArtifactStore("memory://prefetch-test/runs").begin("data", "0" * 16, {}, {})
    (attempt.folder / "rows").write_bytes(b"rows")
    artifact = attempt.commit({}, 0.0)
    release()
    remove_unused()
    prefetch([], [asdict(artifact)])
    assert (attempt.folder / "rows").read_bytes() == b"rows"
    filesystem, root = open_storage(artifact.url)
    filesystem.pipe_file(f"{root}/rows", b"rowz")
    (attempt.folder / "rows").unlink()
    prefetch([], [asdict(artifact)])
    assert f"{artifact.url}: rows has another checksum" in caplog.text
    release()
    filesystem.rm("/prefetch-test", recursive=True)


def test_it_is_done_before_the_process_group_is_made(monkeypatch):
    done = []

    class Group:
        """Notes what its workers are asked to do."""

        def execute(self, function, *arguments):
            done.append((function.__name__, *arguments))

    parent = _Backend.__mro__[1]
    monkeypatch.setattr(parent, "on_start", lambda *_: done.append("process group"))
    models, artifacts = ({"path": "org/model"},), ({"url": "s3://bucket/runs/data-0/a-1"},)
    _Backend().on_start(Group(), WorkerGroupConfig(models=models, artifacts=artifacts))
    assert done == [("prefetch", models, artifacts), ("use_node_interface",), "process group"]
