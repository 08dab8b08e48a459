"""Runs across two machines: network namespaces of this one, joined by a cable that can be cut."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch.conftest import mgpp
from tests.launch.runs import LONGER, OVERRIDES, Driver, outcome, run_in_background
from tests.launch.slurm import render_for_two_nodes, run_script
from tests.object_storage import ACCESS
from tests.processes import MGPP, ROOT, run

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(1500)]

HEAD_IP, OTHER_IP = "10.199.7.1", "10.199.7.2"
S3_PORT = 9753


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
def cores():
    """Of each machine."""
    return 1


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """The home folder of each machine, with what it keeps of artifacts."""
    monkeypatch.delenv("MGPP_CACHE", raising=False)
    made = [tmp_path / f"home-{i}" for i in range(2)]
    for home in made:
        home.mkdir()
    return made


@pytest.fixture
def two_machines(machines, cores, homes, monkeypatch):
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
                     f"--node-ip-address={address}", f"--num-cpus={cores}",
                     *([f"--temp-dir=/tmp/mgpp-{os.getpid()}"] if i == 0 else [])],
                    env={**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(homes[i])},
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


@pytest.fixture
def s3(machines, tmp_path, monkeypatch):
    """A bucket that the first machine serves; the file that lists what was asked for."""
    (head, _), log = machines[0], tmp_path / "requests"
    for name, value in ACCESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{HEAD_IP}:{S3_PORT}")
    monkeypatch.setenv("NO_PROXY", f"{HEAD_IP},{OTHER_IP}")
    server = [sys.executable, "-m", "tests.launch.workers.s3_of_a_machine"]
    process = subprocess.Popen(
        ["ip", "netns", "exec", head, *server, HEAD_IP, str(S3_PORT), "bucket", str(log)],
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        for _ in range(300):
            if log.exists():
                break
            time.sleep(0.1)
        yield "s3://bucket", log
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def requests(log: Path):
    """What machines asked for: address, method, path, bytes of the answer."""
    rows = [line.rsplit(" ", 1) for line in log.read_text().splitlines()]
    return [(*head.split(" ", 2), int(got)) for head, got in rows]


def copied(machine: str, url: str, folder: Path) -> Path:
    """Copy what a machine's storage holds to here."""
    code = (
        "import fsspec, sys; fs = fsspec.filesystem('s3'); "
        "fs.get(sys.argv[1] + '/', sys.argv[2] + '/', recursive=True)"
    )
    command = ["ip", "netns", "exec", machine, sys.executable, "-c", code, url, str(folder)]
    done = run(command, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


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


@pytest.mark.parametrize("cores", [2])
def test_two_machines_of_two_workers_on_an_object_store(project, tmp_path, s3, two_machines, homes):
    """Artifacts once a machine, checkpoints by their owners, the model by all; killed, the same bits."""
    (head, _), _ = two_machines
    bucket, log = s3
    workers = [
        "cluster.num_workers=4", "train.length=80", "dense.enabled=true", "dense.length=8"
    ]  # fmt: skip

    def start(name):
        beside = tmp_path / name
        beside.mkdir(exist_ok=True)
        inside = ["ip", "netns", "exec", head, "env", f"HOME={homes[0]}"]
        where = [f"cluster.address={HEAD_IP}:6399", f"storage={bucket}/{name}"]
        command = [*inside, MGPP, "run", str(project / "run.yaml"), *OVERRIDES, *where, *workers]
        return Driver([*command, "--json"], beside / "runs")

    with start("whole") as driver:
        code, text = driver.end(900)
    assert code == 0, text[-6000:]
    seen = requests(log)  # before this test reads from the bucket itself
    whole = copied(head, f"{bucket}/whole", tmp_path / "copy-whole")
    for file in [*whole.glob("data-*/a-*/**/*"), *whole.glob("dense-*/a-*/model/**/*")]:
        key = f"/bucket/whole/{file.relative_to(whole)}"
        for address in (HEAD_IP, OTHER_IP):
            got = sum(g for a, m, k, g in seen if (a, m, k) == (address, "GET", key))
            assert not file.is_file() or got <= file.stat().st_size, (address, key, got)
    wrote = {a for a, m, k, _ in seen if m in ("PUT", "POST") and "/checkpoints/" in k}
    assert wrote == {HEAD_IP, OTHER_IP}  # each worker its own part, from where it is

    with start("killed") as driver:
        driver.wait_until_shown("prune", 25)
        driver.kill("")
        time.sleep(5)
    before = len(requests(log))
    with start("killed") as driver:
        code, text = driver.end(900)
    assert code == 0, text[-6000:]
    assert "resuming from the checkpoint of step" in text
    read = [
        (a, k, got)
        for a, m, k, got in requests(log)[before:]
        if m == "GET" and "/checkpoints/" in k and got > 10_000
    ]
    killed = copied(head, f"{bucket}/killed", tmp_path / "copy-killed")
    assert outcome(killed) == outcome(whole)
    assert {address for address, *_ in read} == {HEAD_IP, OTHER_IP}
    assert max(Counter(k for _, k, _ in read).values()) == 1  # by its owner alone, once
    for home in homes:
        assert not list(home.rglob("*checkpoint*"))
