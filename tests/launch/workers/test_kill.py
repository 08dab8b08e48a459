"""Real Ray, real processes: a worker, the driver, then everything is killed; nothing is lost."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.launch.runs import outcome, run_in_background

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(1800)]

ROUNDS = max(int(os.environ.get("MGPP_TORTURE_KILLS", "12")) // 3, 1)
LENGTH, PRUNE_START, PRUNE_END = 24, 4, 17


@pytest.mark.parametrize("number", range(ROUNDS))
def test_whatever_is_killed_the_weights_come_out_the_same(project, summary, tmp_path, number):
    torn, chance = tmp_path / "torn", random.Random(number)
    with run_in_background(project, torn) as driver:
        driver.wait_for(chance.randrange(1, PRUNE_START))
        assert driver.kill("RayTrainWorker") >= 1
        driver.wait_for(chance.randrange(PRUNE_START + 4, PRUNE_END - 2))
        os.kill(driver.process.pid, signal.SIGKILL)
        driver.process.wait(timeout=30)
    with run_in_background(project, torn) as driver:
        driver.wait_for(chance.randrange(PRUNE_END + 1, LENGTH - 3))
        assert driver.kill("") > 3
    # Ray Train does not write its own record in one piece: a half of it must not matter.
    for record in torn.glob("*/ray/**/*.json"):
        record.write_text("{")
    with run_in_background(project, torn) as driver:
        assert driver.process.wait(timeout=300) == 0, driver.log.read_text()[-4000:]
    assert driver.log.read_text().count("resuming from the checkpoint of step") >= 2
    assert outcome(torn) == outcome(Path(summary["artifacts"]["prune"]).parent.parent)


def test_a_killed_run_goes_on_with_other_workers_at_another_stage(project, summary, tmp_path):
    torn = tmp_path / "torn"
    with run_in_background(project, torn) as driver:
        driver.wait_for(PRUNE_START + 6)
        assert driver.kill("") > 3
    with run_in_background(project, torn, "cluster.num_workers=1", "zero.stage=2") as driver:
        assert driver.process.wait(timeout=300) == 0, driver.log.read_text()[-4000:]
    assert "resuming from the checkpoint of step" in driver.log.read_text()
    _, figures, prunings, _ = outcome(torn)
    _, undisturbed, whole, _ = outcome(Path(summary["artifacts"]["prune"]).parent.parent)
    assert figures["num_zeros"] == undisturbed["num_zeros"]
    assert figures["num_pruned"] == undisturbed["num_pruned"]
    # Dropout is drawn by worker, so that only what was before the kill is the same.
    assert [p["step"] for p in prunings] == [p["step"] for p in whole]
    assert prunings[0] == whole[0]


def test_an_operator_is_compiled_once_a_node_and_it_is_told(project, tmp_path, monkeypatch):
    monkeypatch.setenv("MGPP_DEEPSPEED_SHM", "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    with run_in_background(project, tmp_path / "runs", "dense.enabled=false") as driver:
        code, log = driver.end()
    assert code == 0, log[-4000:]
    assert log.count("loading DeepSpeed's deepspeed_shm_comm; each node compiles it once") == 1
    assert len(list(tmp_path.glob("extensions/**/*.so"))) == 1
