"""Runs across two machines: network namespaces of this one, joined by a cable that can be cut."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch.conftest import mgpp
from tests.launch.runs import LONGER, OVERRIDES, outcome, run_in_background
from tests.launch.slurm import render_for_two_nodes, run_script

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(1500)]

HEAD_IP, OTHER_IP = "10.199.7.1", "10.199.7.2"


def ip(*arguments, check=True):
    return subprocess.run(
        ["ip", *arguments], check=check, timeout=30, capture_output=True, text=True
    )


@pytest.fixture
def machines():
    """Names of two network namespaces, and the ends of the cable between them."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"mgpp-{os.getpid()}-{i}" for i in range(2)]
    cable = [f"mg{os.getpid() % 10000}{side}" for side in "ab"]
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
        yield names, cable
    finally:
        for name in names:
            pids = ip("netns", "pids", name, check=False).stdout.split()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name, check=False)


@pytest.fixture
def two_machines(machines, monkeypatch):
    """The same, with Ray's head on the one and a node on the other."""
    names, cable = machines
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    rays = []
    try:
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
    assert "error: 2 workers did not start within cluster.wait_seconds (15)" in log
    assert "Traceback" not in log
    alone = mgpp(
        project, "run", str(project / "run.yaml"), *OVERRIDES, *LONGER,
        f"storage={tmp_path / 'runs'}", "cluster.num_workers=1", "--json",
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-4000:]
    assert "resuming from the checkpoint of step" in alone.stderr
    assert json.loads(alone.stdout)["status"] == "done"


def test_the_symmetric_slurm_script_runs_a_whole_pipeline(project, undisturbed, tmp_path, machines):
    names, _ = machines
    script = render_for_two_nodes(
        project, tmp_path, "symmetric", *OVERRIDES, *LONGER, cpus_per_node=1
    )
    # Each task in a namespace of processes too: at its end symmetric-run stops every Ray that it sees.
    inside = [
        f"ip netns exec {name} unshare --pid --fork --mount-proc --kill-child" for name in names
    ]
    run_script(script, tmp_path, job_id=17, head_ip=HEAD_IP, inside=inside)
    assert outcome(tmp_path / "runs") == undisturbed
