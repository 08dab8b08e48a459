"""Real Ray, real processes: a worker, the driver, then everything is killed; nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from pipeline.artifacts import open_artifact
from pipeline.recorder import read_records

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(1800)]

ROUNDS = max(int(os.environ.get("MGPP_TORTURE_KILLS", "12")) // 3, 1)
# None of these changes what comes out.
OVERRIDES = ["train.checkpoint_every=2", "train.log_every=1"]
LENGTH, PRUNE_START, PRUNE_END = 24, 4, 17


class Driver:
    """`mgpp run` in the background; all processes it starts carry a mark in their environment."""

    def __init__(self, project: Path, storage: Path, *overrides: str) -> None:
        self.mark = f"MGPP_TEST={uuid.uuid4().hex}"
        self.storage = storage
        self.log = storage.parent / "driver.log"
        name, _, value = self.mark.partition("=")
        command = [str(Path(sys.executable).with_name("mgpp")), "run", str(project / "run.yaml")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *OVERRIDES, f"storage={storage}", *overrides],
                env={**os.environ, "HF_HUB_OFFLINE": "1", name: value},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill("")
        self.process.wait(timeout=30)

    def kill(self, title: str) -> int:
        """SIGKILL every process that carries the mark and whose command line holds `title`."""
        killed = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (folder / "environ").read_bytes()
                if marked and title.encode() in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
                    killed += 1
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended meanwhile
        return killed

    def wait_for(self, step: int, timeout: float = 240) -> None:
        """Wait until the newest attempt has recorded a step."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            files = self.storage.glob("prune-*/a-*/metrics.jsonl")
            newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
            if newest and newest.stat().st_size and last_step(newest) >= step:
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached:\n{self.log.read_text()[-4000:]}")


def last_step(path: Path) -> int:
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else -1


def outcome(storage: Path):
    (folder,) = storage.glob("prune-*")
    artifact = open_artifact(str(folder))
    records = read_records(artifact.path / "metrics.jsonl")
    weights = json.loads((artifact.path / "weights.json").read_text())
    return weights, artifact.metrics, records["prune"], records["layers"]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_whatever_is_killed_the_weights_come_out_the_same(project, summary, tmp_path, number):
    torn, chance = tmp_path / "torn", random.Random(number)
    with Driver(project, torn) as driver:
        driver.wait_for(chance.randrange(1, PRUNE_START))
        assert driver.kill("RayTrainWorker") >= 1
        driver.wait_for(chance.randrange(PRUNE_START + 4, PRUNE_END - 2))
        os.kill(driver.process.pid, signal.SIGKILL)
        driver.process.wait(timeout=30)
    with Driver(project, torn) as driver:
        driver.wait_for(chance.randrange(PRUNE_END + 1, LENGTH - 3))
        assert driver.kill("") > 3
    with Driver(project, torn) as driver:
        assert driver.process.wait(timeout=300) == 0, driver.log.read_text()[-4000:]
    assert driver.log.read_text().count("goes on from the checkpoint of step") >= 2
    assert outcome(torn) == outcome(Path(summary["artifacts"]["prune"]).parent.parent)


def test_a_killed_run_goes_on_with_other_workers_at_another_stage(project, summary, tmp_path):
    torn = tmp_path / "torn"
    with Driver(project, torn) as driver:
        driver.wait_for(PRUNE_START + 6)
        assert driver.kill("") > 3
    with Driver(project, torn, "cluster.num_workers=1", "zero.stage=2") as driver:
        assert driver.process.wait(timeout=300) == 0, driver.log.read_text()[-4000:]
    assert "goes on from the checkpoint of step" in driver.log.read_text()
    _, figures, prunings, _ = outcome(torn)
    _, undisturbed, whole, _ = outcome(Path(summary["artifacts"]["prune"]).parent.parent)
    assert figures["num_zeros"] == undisturbed["num_zeros"]
    assert figures["num_pruned"] == undisturbed["num_pruned"]
    # Dropout is drawn by worker, so that only what was before the kill is the same.
    assert [p["step"] for p in prunings] == [p["step"] for p in whole]
    assert prunings[0] == whole[0]
