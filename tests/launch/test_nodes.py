"""Nodes of a cluster that are lost, hang, or are cut off in the middle of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.artifacts import open_artifact
from tests.launch.conftest import mgpp
from tests.launch.driver import OVERRIDES, outcome, run_in_background

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(1500)]

# Long enough to lose a node in the middle of it.
LONGER = ["train.length=160", "dense.enabled=false"]


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """What the same run leaves where nothing happens to it."""
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    with run_in_background(project, storage, *LONGER) as run:
        code, log = run.end()
    assert code == 0, log[-6000:]
    return outcome(storage)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def start(project, storage, cluster, *overrides):
    return run_in_background(
        project, storage, *LONGER, f"cluster.address={cluster.address}", *overrides
    )


def test_a_node_that_comes_back_takes_the_gang_on(project, undisturbed, tmp_path, cluster):
    for _ in range(2):
        last = cluster.add_node(num_cpus=1)
    with start(project, tmp_path / "runs", cluster) as run:
        run.wait_for(8)
        cluster.remove_node(last, allow_graceful=False)
        time.sleep(5)
        cluster.add_node(num_cpus=1)
        code, log = run.end()
    assert code == 0, log[-6000:]
    assert "workers lost (" in log
    assert "goes on from the checkpoint of step" in log
    assert outcome(tmp_path / "runs") == undisturbed


def test_without_it_fewer_workers_go_on(project, tmp_path, cluster):
    for _ in range(2):
        last = cluster.add_node(num_cpus=1)
    fewer = ["cluster.min_workers=1", "cluster.wait_seconds=15"]
    with start(project, tmp_path / "runs", cluster, *fewer) as run:
        run.wait_for(8)
        cluster.remove_node(last, allow_graceful=False)
        code, log = run.end()
    assert code == 0, log[-6000:]
    assert "goes on with 1 workers instead of 2" in log
    assert "goes on from the checkpoint of step" in log
    (folder,) = (tmp_path / "runs").glob("prune-*")
    metrics = open_artifact(str(folder)).metrics
    assert metrics["num_zeros"] == int(0.8 * metrics["num_prunable"])


def test_where_no_fewer_are_allowed_it_ends_within_its_limits(project, tmp_path, cluster):
    for _ in range(2):
        last = cluster.add_node(num_cpus=1)
    limits = ["cluster.wait_seconds=15", "cluster.max_failures=1"]
    with start(project, tmp_path / "runs", cluster, *limits) as run:
        run.wait_for(8)
        cluster.remove_node(last, allow_graceful=False)
        code, log = run.end(timeout=240)
    assert code == 1, log[-6000:]


def test_a_gang_that_cannot_be_is_refused_at_once(project, tmp_path, cluster):
    cluster.add_node(num_cpus=1)
    since = time.monotonic()
    with start(project, tmp_path / "runs", cluster) as run:
        code, log = run.end(timeout=120)
    assert code == 2, log
    assert "the cluster can hold 1 (nodes: 0 CPUs and 0 GPUs, 1 CPUs and 0 GPUs)" in log
    assert time.monotonic() - since < 90
    assert not (tmp_path / "runs").exists()


def test_a_gang_waits_for_others_to_end(project, undisturbed, tmp_path, cluster):
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, logging_level="error")
    try:
        other_work = ray.remote(num_cpus=1)(Counter).remote()
        ray.get(other_work.__ray_ready__.remote())
        with start(project, tmp_path / "runs", cluster, "cluster.wait_seconds=10") as run:
            run.wait_until_told("other work holds the cluster: waits on for 2 workers")
            ray.kill(other_work)
            code, log = run.end()
    finally:
        ray.shutdown()
    assert code == 0, log[-6000:]
    assert outcome(tmp_path / "runs") == undisturbed


def test_a_worker_that_hangs_is_found_within_the_limit(project, undisturbed, tmp_path, cluster):
    cluster.add_node(num_cpus=2)
    with start(project, tmp_path / "runs", cluster, "cluster.timeout_seconds=30") as run:
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


# Two machines: network namespaces joined by a cable.

HEAD_IP, OTHER_IP = "10.199.7.1", "10.199.7.2"


def ip(*arguments, check=True):
    return subprocess.run(
        ["ip", *arguments], check=check, timeout=30, capture_output=True, text=True
    )


@pytest.fixture
def two_machines(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"mgpp-{os.getpid()}-{i}" for i in range(2)]
    cable = [f"mg{os.getpid() % 10000}{side}" for side in "ab"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    rays = []
    try:
        for name in names:
            if (made := ip("netns", "add", name, check=False)).returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for name, end, address in zip(names, cable, (HEAD_IP, OTHER_IP), strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        ray = str(Path(sys.executable).with_name("ray"))
        for i, (name, address) in enumerate(zip(names, (HEAD_IP, OTHER_IP), strict=True)):
            where = (
                ["--head", "--port=6399", "--include-dashboard=false"]
                if i == 0
                else [f"--address={HEAD_IP}:6399"]
            )
            rays.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, ray, "start", "--block", *where,
                     f"--node-ip-address={address}", "--num-cpus=1",
                     *([f"--temp-dir=/tmp/mgpp-{os.getpid()}"] if i == 0 else [])],
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                    start_new_session=True,
                )
            )  # fmt: skip
            time.sleep(10)
        yield names, cable
    finally:
        for process in rays:
            process.terminate()
        for process in rays:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        for name in names:
            pids = ip("netns", "pids", name, check=False).stdout.split()
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name, check=False)


def on_two_machines(project, storage, name, *overrides):
    inside = ["ip", "netns", "exec", name]
    where = [f"cluster.address={HEAD_IP}:6399", "cluster.placement=SPREAD"]
    return run_in_background(project, storage, *LONGER, *where, *overrides, inside=inside)


def test_a_run_across_two_machines(project, undisturbed, tmp_path, two_machines):
    (head, _), _ = two_machines
    with on_two_machines(project, tmp_path / "runs", head) as run:
        code, log = run.end()
    assert code == 0, log[-6000:]
    assert outcome(tmp_path / "runs") == undisturbed


def test_a_cable_that_is_cut_ends_in_a_clear_error_and_the_next_run_goes_on(
    project, tmp_path, two_machines
):
    (head, _), (cable, _) = two_machines
    limits = [
        "cluster.timeout_seconds=20", "cluster.wait_seconds=15", "cluster.max_failures=1"
    ]  # fmt: skip
    with on_two_machines(project, tmp_path / "runs", head, *limits) as run:
        run.wait_for(8)
        ip("-n", head, "link", "set", cable, "down")
        code, log = run.end(timeout=400)
    assert code == 1, log[-6000:]
    assert "workers lost (" in log
    alone = mgpp(
        project, "run", str(project / "run.yaml"), *OVERRIDES, *LONGER,
        f"storage={tmp_path / 'runs'}", "cluster.num_workers=1", "--json",
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-4000:]
    assert "goes on from the checkpoint of step" in alone.stderr
    assert json.loads(alone.stdout)["status"] == "done"
