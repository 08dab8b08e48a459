"""Jobs on a Ray head that the test starts: success, failure, stop, resubmission, attaching."""

import json
import re
import signal
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml

from launch.cluster.submission import make_submission
from pipeline.errors import ConfigError
from pipeline.store.artifacts import open_artifact
from tests.launch.ray_head import ray_head
from tests.launch.runs import HUNG, Driver
from tests.processes import MGPP, free_port, run

distributed = pytest.mark.distributed
QUICK = ["cluster.num_workers=1", "zero.stage=0"]


@pytest.fixture(scope="module")
def access(tmp_path_factory):
    """A token of its own, whatever this machine has."""
    token = tmp_path_factory.mktemp("access") / "token"
    token.write_text("a-token-that-no-log-may-show-0123456789abcdef")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="module")
def head(access):
    with pytest.MonkeyPatch.context() as monkeypatch:  # for those who call it, too
        for name, value in access.items():
            monkeypatch.setenv(name, value)
        with ray_head() as started:
            yield started


@pytest.fixture(scope="module")
def shipped(project, tmp_path_factory):
    """A folder as it would be shipped: the configuration and what does not belong on a cluster."""
    folder = tmp_path_factory.mktemp("shipped")
    values = yaml.safe_load((project / "run.yaml").read_text())
    values["storage"] = str(folder.parent / "cluster-runs")
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / ".gitignore").write_text("large.bin\n")
    (folder / "large.bin").write_bytes(bytes(1000))
    return folder


def cli(shipped, *arguments, timeout=300, env=None):
    return run([MGPP, *arguments], timeout=timeout, env={"HF_HUB_OFFLINE": "1", **(env or {})})


def submit(head, shipped, *overrides, **kwargs):
    path = str(shipped / "run.yaml")
    where = ["--address", head.dashboard, "--working-dir", str(shipped), "--shared", "/"]
    return cli(shipped, "submit", path, *QUICK, *overrides, *where, **kwargs)


def attached(head, shipped, *overrides):
    """Submit in the background, and follow the job."""
    where = ["--address", head.dashboard, "--working-dir", str(shipped), "--shared", "/", "--json"]
    command = [MGPP, "submit", str(shipped / "run.yaml"), *QUICK, *overrides, *where]
    folder = shipped.parent / uuid.uuid4().hex
    folder.mkdir()
    return Driver(command, folder / "runs")


def job_of(log):
    return next(line.split()[0] for line in log.splitlines() if line.startswith("mgpp-tiny-"))


@distributed
@pytest.mark.timeout(900)
def test_a_job_runs_to_its_end_and_is_listed(head, shipped):
    done = submit(head, shipped)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "sparsity" in done.stdout  # the closing table is in the log
    job = job_of(done.stderr)
    assert job.endswith("-1")
    listed = json.loads(cli(shipped, "jobs", "--address", head.dashboard, "--json").stdout)["jobs"]
    assert [(j["job"], j["status"], j["exit_code"]) for j in listed][-1] == (job, "SUCCEEDED", 0)
    assert listed[-1]["command"].startswith("mgpp run run.yaml cluster.num_workers=1")
    folder = next((shipped.parent / "cluster-runs").glob("export-*"))
    assert open_artifact(str(folder)).metrics["sparsity"] > 0.79
    log = cli(shipped, "logs", job, "--address", head.dashboard).stdout
    assert "prune     done in" in log


@distributed
def test_a_job_that_fails_says_so_by_its_exit_code(head, shipped):
    wrong = submit(head, shipped, "model.path=/nowhere/at-all")
    assert wrong.returncode == 2
    assert "model.path" in wrong.stdout
    assert "FAILED" in wrong.stderr


@distributed
@pytest.mark.timeout(900)
def test_a_running_job_is_attached_to_stopped_and_gone_on_with(head, shipped):
    longer = ["train.length=4000", "train.checkpoint_every=5", "dense.enabled=false"]
    begun = submit(head, shipped, *longer, "--detach", "--json")
    assert begun.returncode == 0, begun.stderr
    job = json.loads(begun.stdout)["job"]
    runs = shipped.parent / "cluster-runs"
    deadline = time.monotonic() + HUNG
    while not list(runs.glob("prune-*/checkpoints/step-*/_DONE.json")):
        assert time.monotonic() < deadline, cli(
            shipped, "logs", job, "--address", head.dashboard
        ).stdout[-4000:]
        time.sleep(0.5)

    with attached(head, shipped, *longer) as follower:
        follower.wait_until_told(f"{job} is already running; following it")
        follower.process.send_signal(signal.SIGINT)
        code, log = follower.end(60)
    assert code == 130, log
    assert f"interrupted: Ctrl-C (SIGINT); kept: {job} runs on; follow it: mgpp logs {job}" in log
    assert json.loads(log.splitlines()[-1])["status"] == "interrupted"

    with attached(head, shipped, *longer) as follower:
        follower.wait_until_told(f"{job} is already running; following it")
        stopped = cli(shipped, "stop", job, "--address", head.dashboard, "--json")
        code, log = follower.end(60)
    assert stopped.returncode == 0, stopped.stderr
    told = json.loads(stopped.stdout)
    assert told["status"] == "STOPPED"
    kept = re.fullmatch(
        r"stopped: SIGTERM; kept: data done, prune saved at step (\d+); rerun the same command .*",
        told["message"],
    )
    assert kept, told
    assert not list(runs.glob("*/_LEASE*")), "a stopped run gives its leases back"
    values = json.loads(log.splitlines()[-1])
    assert (code, values["status"], values["exit_code"]) == (143, "stopped", 143)
    assert (values["job"], values["job_status"]) == (job, "STOPPED")

    with attached(head, shipped, *longer) as follower:
        follower.wait_until_told(f"resuming from the checkpoint of step {kept[1]}\n")
        resumed = job_of(follower.log.read_text())
        assert resumed == job.removesuffix("1") + "2"
        cli(shipped, "stop", resumed, "--address", head.dashboard)


@distributed
def test_plain_ray_job_submit(head, shipped):
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", head.dashboard, "--working-dir", str(shipped)]
    done = run(
        [*command, "--", "mgpp", "validate", "run.yaml", *QUICK],
        timeout=200,
        env={"RAY_AUTH_MODE": "token"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "run.yaml is valid" in done.stdout


@distributed
def test_what_is_not_there_is_told(head, shipped):
    missing = cli(shipped, "stop", "mgpp-none-1", "--address", head.dashboard)
    assert missing.returncode == 2
    assert "mgpp-none-1: no such job; jobs are " in missing.stderr
    nobody = cli(shipped, "jobs", "--address", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == 2
    assert "--address: no Ray job server at" in nobody.stderr


@distributed
def test_a_cluster_that_asks_for_a_token(head, shipped, access, tmp_path):
    where = ["--address", head.dashboard]
    without = cli(shipped, "jobs", *where, env={"RAY_AUTH_MODE": "disabled"})
    assert without.returncode == 2, without.stderr
    assert "asks for a token" in without.stderr
    another = tmp_path / "another"
    another.write_text("another")
    wrong = cli(shipped, "jobs", *where, env={**access, "RAY_AUTH_TOKEN_PATH": str(another)})
    assert wrong.returncode == 2
    assert "asks for a token" in wrong.stderr
    right = cli(shipped, "jobs", *where, "--json", env=access)
    assert right.returncode == 0, right.stderr
    secret = Path(access["RAY_AUTH_TOKEN_PATH"]).read_text()
    for done in (without, wrong, right):
        assert secret not in done.stdout + done.stderr


# What is shipped, and what is told before anything is.


def test_what_is_shipped_and_how_it_is_named(shipped, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    path = str(shipped / "run.yaml")
    where = {"working_dir": str(shipped), "shared": ["/"]}
    made = make_submission(path, ["train.lr=0.1"], excludes=["data/"], **where)
    assert made.entrypoint == "mgpp run run.yaml train.lr=0.1"
    assert made.runtime_env["working_dir"] == str(shipped)
    assert {".git/", ".venv/", "data/"} <= set(made.runtime_env["excludes"])
    assert made.runtime_env["env_vars"]["HF_HUB_OFFLINE"] == "1"
    assert "a-secret" not in str(made)
    same = make_submission(path, ["train.lr=0.1"], **where)
    other = make_submission(path, ["train.lr=0.2"], **where)
    assert made.name == same.name != other.name
    assert made.name.startswith("mgpp-tiny-")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["storage=runs"], "storage: got 'runs'; it would be in the job's temporary folder"),
        (["train.lr=-1"], "train.lr: "),
        (["cluster.address=ray://head:10001"], "cluster.address: got 'ray://head:10001'"),
    ],
)
def test_mistakes_are_told_before_anything_is_shipped(shipped, overrides, complaint):
    with pytest.raises(ConfigError) as caught:
        make_submission(
            str(shipped / "run.yaml"), overrides, working_dir=str(shipped), shared=["/"]
        )
    assert any(str(problem).startswith(complaint) for problem in caught.value.problems)


def test_a_configuration_outside_the_folder_is_refused(shipped, tmp_path):
    with pytest.raises(ConfigError, match="must be in the folder that is shipped"):
        make_submission(str(shipped / "run.yaml"), [], working_dir=str(tmp_path))
