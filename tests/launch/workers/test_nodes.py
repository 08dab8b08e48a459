"""Nodes of a cluster that are lost or hang in the middle of a run; each is a process of this machine."""

import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from pipeline.store.artifacts import open_artifact
from tests.launch.runs import outcome, run_on
from tests.processes import run as run_command

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(1500)]


def test_a_node_that_comes_back_takes_the_gang_on(project, undisturbed, tmp_path, cluster):
    for _ in range(2):
        last = cluster.add_node(num_cpus=1)
    with run_on(project, tmp_path / "runs", cluster) as run:
        run.wait_for(8)
        cluster.remove_node(last, allow_graceful=False)
        time.sleep(5)
        cluster.add_node(num_cpus=1)
        code, log = run.end()
    assert code == 0, log[-6000:]
    assert "workers lost (" in log
    assert "resuming from the checkpoint of step" in log
    assert outcome(tmp_path / "runs") == undisturbed


def test_without_it_fewer_workers_go_on(project, tmp_path, cluster):
    for _ in range(2):
        last = cluster.add_node(num_cpus=1)
    fewer = ["cluster.min_workers=1", "cluster.wait_seconds=15"]
    with run_on(project, tmp_path / "runs", cluster, *fewer) as run:
        run.wait_for(8)
        cluster.remove_node(last, allow_graceful=False)
        code, log = run.end()
    assert code == 0, log[-6000:]
    assert "resuming with 1 workers instead of 2" in log
    assert "resuming from the checkpoint of step" in log
    (folder,) = (tmp_path / "runs").glob("prune-*")
    metrics = open_artifact(str(folder)).metrics
    assert metrics["num_zeros"] == int(0.8 * metrics["num_prunable"])


def test_where_no_fewer_are_allowed_it_ends_within_its_limits(project, tmp_path, cluster):
    for _ in range(2):
        last = cluster.add_node(num_cpus=1)
    limits = ["cluster.wait_seconds=15", "cluster.max_failures=1"]
    with run_on(project, tmp_path / "runs", cluster, *limits) as run:
        run.wait_for(8)
        cluster.remove_node(last, allow_graceful=False)
        code, log = run.end(timeout=240)
    assert code == 1, log[-6000:]
    assert log.splitlines()[-1].startswith(
        "error: 2 workers did not start within cluster.wait_seconds (15); there is room for 1 now."
    )


def test_a_gang_waits_for_others_to_end(project, undisturbed, tmp_path, cluster):
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, logging_level="error")
    try:
        other_work = ray.remote(num_cpus=1)(Counter).remote()
        ray.get(other_work.__ray_ready__.remote())
        with run_on(project, tmp_path / "runs", cluster, "cluster.wait_seconds=10") as run:
            run.wait_until_told("waiting for 2 workers: other work occupies the cluster")
            ray.kill(other_work)
            code, log = run.end()
    finally:
        ray.shutdown()
    assert code == 0, log[-6000:]
    assert outcome(tmp_path / "runs") == undisturbed


def test_a_worker_that_hangs_is_found_within_the_limit(project, undisturbed, tmp_path, cluster):
    cluster.add_node(num_cpus=2)
    with run_on(project, tmp_path / "runs", cluster, "cluster.timeout_seconds=30") as run:
        run.wait_for(8)
        stopped = _worker_processes(tmp_path / "runs")
        os.kill(stopped[-1], signal.SIGSTOP)
        try:
            code, log = run.end()
        finally:
            for pid in stopped:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
    assert code == 0, log[-6000:]
    assert "workers lost (" in log
    assert outcome(tmp_path / "runs") == undisturbed


def test_a_node_that_is_drained_is_left_with_the_steps_saved(
    project, undisturbed, tmp_path, cluster, monkeypatch
):
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    for _ in range(2):
        leaving = cluster.add_node(num_cpus=1)
    with run_on(project, tmp_path / "runs", cluster, "train.checkpoint_every=1000") as run:
        run.wait_for(8)
        cluster.add_node(num_cpus=1)
        drain(cluster, leaving)
        run.wait_until_told("workers lost (node drained): prune: saved at step ")
        cluster.remove_node(leaving, allow_graceful=False)
        code, log = run.end()
    assert code == 0, log[-6000:]
    step = re.search(r"\(node drained\): prune: saved at step (\d+)", log)[1]
    assert f"resuming from the checkpoint of step {step}" in log
    assert outcome(tmp_path / "runs") == undisturbed


def test_where_no_node_takes_its_place_the_run_ends_with_the_steps_saved(
    project, tmp_path, cluster, monkeypatch
):
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    for _ in range(2):
        leaving = cluster.add_node(num_cpus=1)
    limits = ["cluster.wait_seconds=10", "train.checkpoint_every=1000"]
    with run_on(project, tmp_path / "runs", cluster, *limits) as run:
        run.wait_for(8)
        drain(cluster, leaving)
        code, log = run.end(timeout=240)
    assert code == 1, log[-6000:]
    step = re.search(r"\(node drained\): prune: saved at step (\d+)", log)[1]
    last = log.splitlines()[-1]
    assert "(10); there is room for 1 now" in last
    assert f"kept: data done, prune saved at step {step}" in last


def drain(cluster, node):
    """Ask Ray to drain a node, as a cloud's notice does."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test takes it back"]
    where = ["--address", cluster.address, "--node-id", node.node_id]
    limit = ["--deadline-remaining-seconds", "120"]
    asked = run_command([ray_command, "drain-node", *where, *why, *limit], timeout=60)
    assert asked.returncode == 0, asked.stderr


def _worker_processes(storage):
    """The training workers whose files are under a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"RayTrainWorker" not in (process / "cmdline").read_bytes():
                continue
            open_files = [os.readlink(fd) for fd in (process / "fd").iterdir()]
            environ = (process / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if any(str(storage) in path for path in open_files) or str(storage).encode() in environ:
            found.append(int(process.name))
    assert found, "no worker of the run"
    return sorted(found)
