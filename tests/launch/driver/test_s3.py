"""A run whose storage is S3 (a server on loopback): killed, gone on with, cleared, verified, mended."""

import json
import time

import pytest

from pipeline.storage.filesystems import open_storage
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.checkpoint_manifest import newest_step
from pipeline.store.maintenance import entries
from tests.launch.conftest import mgpp
from tests.launch.runs import Driver
from tests.object_storage import ACCESS
from tests.processes import MGPP

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QUICK = [
    "cluster.num_workers=1",
    "zero.stage=0",
    "dense.enabled=false",
    "train.length=200",  # long enough to be killed in the middle
    "train.checkpoint_every=10",
]


def of_stage(storage, stage):
    return [entry for entry in entries(ArtifactStore(storage)) if entry.stage == stage]


@pytest.mark.torture
def test_a_run_on_s3_is_killed_and_goes_on(project, bucket, tmp_path):
    storage = f"{bucket}/killed"
    arguments = ["run", str(project / "run.yaml"), *QUICK, f"storage={storage}"]
    with Driver([MGPP, *arguments], tmp_path / "beside") as driver:
        deadline = time.monotonic() + 300
        while not any(newest_step(f"{e.url}/checkpoints") for e in of_stage(storage, "prune")):
            assert driver.process.poll() is None, driver.log.read_text()[-4000:]
            assert time.monotonic() < deadline, driver.log.read_text()[-4000:]
            time.sleep(0.1)
    (begun,) = of_stage(storage, "prune")
    assert begun.artifact is None
    freed = json.loads(mgpp(project, "store", "gc", storage, "--json").stdout)
    assert any("/prune-" in url for url in freed["urls"])  # its lease; not its checkpoints

    resumed = mgpp(project, *arguments, "--json")
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert "resuming from the checkpoint of step" in resumed.stderr
    summary = json.loads(resumed.stdout)
    assert summary["model"].startswith(f"{storage}/export-")
    local = mgpp(project, *arguments, f"storage={tmp_path / 'local'}", "--json")
    assert json.loads(local.stdout)["metrics"] == summary["metrics"]
    expect_no_secret(bucket, driver.log.read_bytes())


def test_a_run_on_s3_is_listed_verified_and_mended(project, bucket):
    storage = f"{bucket}/runs"
    few = ["train.length=24", "train.checkpoint_every=10"]
    arguments = ["run", str(project / "run.yaml"), *QUICK, *few, f"storage={storage}"]
    done = mgpp(project, *arguments, "--json")
    assert done.returncode == 0, done.stderr[-6000:]
    summary = json.loads(done.stdout)
    assert summary["model"].startswith(f"{storage}/export-")

    listed = json.loads(mgpp(project, "store", "ls", storage, "--json").stdout)["entries"]
    assert {entry["stage"]: entry["state"] for entry in listed} == dict.fromkeys(
        ["data", "prune", "evaluate", "export", "report"], "done"
    )
    verified = mgpp(project, "store", "verify", storage, "--json")
    assert json.loads(verified.stdout) == {
        "status": "verified",
        "num_artifacts": 5,
        "num_checkpoints": 0,
        "num_unsealed": 0,
    }

    filesystem, root = open_storage(summary["model"])
    path = f"{root}/model.safetensors"
    whole = filesystem.cat_file(path)
    filesystem.pipe_file(path, whole[:-1])
    damaged = mgpp(project, "store", "verify", storage, "--discard")
    assert damaged.returncode == 1
    assert "model.safetensors has" in damaged.stderr
    again = mgpp(project, *arguments, "--json")
    assert again.returncode == 0, again.stderr[-4000:]
    assert json.loads(again.stdout)["cached"] == ["data", "prune", "evaluate", "report"]
    assert (
        filesystem.cat_file(
            open_storage(json.loads(again.stdout)["model"])[1] + "/model.safetensors"
        )
        == whole
    )

    expect_no_secret(bucket, done.stderr.encode() + done.stdout.encode())


def expect_no_secret(bucket, printed):
    """What opens the bucket is nowhere in it, nor in what was printed."""
    secret = ACCESS["AWS_SECRET_ACCESS_KEY"].encode()
    filesystem, _ = open_storage(bucket)
    everything = filesystem.find(bucket.removeprefix("s3://"))
    assert len(everything) > 20
    assert not any(secret in filesystem.cat_file(name) for name in everything)
    assert secret not in printed
