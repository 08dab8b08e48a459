"""Runs across two machines: network namespaces of this one, joined by a cable that can be cut."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import mgpp
from tests.launch.driver import LONGER, OVERRIDES, outcome, run_in_background
from tests.processes import run

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
    assert "goes on from the checkpoint of step" in alone.stderr
    assert json.loads(alone.stdout)["status"] == "done"


# Each task in a namespace of processes too: at its end symmetric-run stops every Ray that it sees.
SRUN = """#!/bin/bash
tasks=1
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && tasks=${1#--ntasks=}
  shift
done
machines=(MACHINES)
pids=()
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i ip netns exec "${machines[$i]}" \\
    unshare --pid --fork --mount-proc --kill-child "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


def test_the_symmetric_slurm_script_runs_a_whole_pipeline(project, undisturbed, tmp_path, machines):
    names, _ = machines
    values = yaml.safe_load((project / "run.yaml").read_text())
    values["storage"] = str(tmp_path / "runs")
    values["cluster"] = {"num_workers": 2, "placement": "SPREAD"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    made = mgpp(
        project, "cluster", "render", "slurm", str(tmp_path / "run.yaml"), *OVERRIDES, *LONGER,
        "--nodes", "2", "--cpus-per-node", "1", "--output", str(tmp_path), "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    script = next(file for file in json.loads(made.stdout)["files"] if "symmetric" in file)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in {
        "srun": SRUN.replace("MACHINES", " ".join(names)),
        "scontrol": "#!/bin/bash\necho first\necho second\n",
        "hostname": f"#!/bin/bash\necho {HEAD_IP}\n",
    }.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod((binaries / name).stat().st_mode | stat.S_IXUSR)
    with tempfile.TemporaryDirectory(prefix="ray-") as sessions:  # sockets have short paths
        done = run(
            ["bash", script],
            timeout=400,
            env={
                "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SLURM_JOB_NODELIST": "first,second",
                "SLURM_JOB_ID": "17",
                "HF_HUB_OFFLINE": "1",
                "RAY_TMPDIR": sessions,
                "RAY_AUTH_TOKEN": "a-token-of-this-test-0123456789abcdef",
            },
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert outcome(tmp_path / "runs") == undisturbed
