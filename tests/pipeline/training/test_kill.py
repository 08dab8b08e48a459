"""Killed at random moments of every phase, a run ends with the weights it would have had, bit for bit."""

import json
import os
import sys

import pytest

from pipeline.tracking.recorder import read_records
from tests.processes import run

NUM_KILLS = int(os.environ.get("MGPP_TORTURE_KILLS", "8"))


@pytest.mark.distributed
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("case", "writing"), [("stage2", "foreground"), ("stage3", "background")])
def test_killed_again_and_again(tiny_bert, train_data, tmp_path, case, writing):
    num_kills = max(NUM_KILLS // 2, 1)
    arguments = [tiny_bert, train_data, tmp_path, case, writing, num_kills, 7]
    command = [sys.executable, "-m", "tests.pipeline.training.kill_worker", *map(str, arguments)]
    done = run(command, timeout=120 + 60 * num_kills, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert len(kills) == num_kills
    assert not any(kill["survived"] for kill in kills)
    assert any(kill.get("damaged") for kill in kills)
    peace, torn = tmp_path / "peace", tmp_path / "torn"
    for name in ("weights.json", "figures.json"):
        assert json.loads((torn / name).read_text()) == json.loads((peace / name).read_text())
    records = [read_records(folder / "metrics.jsonl") for folder in (peace, torn)]
    assert records[0]["prune"] == records[1]["prune"]
    assert [r["step"] for r in records[1]["step"]] == [r["step"] for r in records[0]["step"]]
    assert [r["loss"] for r in records[1]["step"]] == [r["loss"] for r in records[0]["step"]]
