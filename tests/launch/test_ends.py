"""How `mgpp run` ends, whatever ends it and wherever: what is told, what is kept, what is left behind."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.launch.runs import LONGER, OVERRIDES, Driver, outcome, run_in_background
from tests.processes import MGPP, ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
torture = pytest.mark.torture

HELD = os.pathsep.join([str(Path(__file__).parent / "held"), str(ROOT)])
TOLD = ("done: ", "error: ", "stopped: ", "interrupted: ")
WAY_OUT = 10.0  # seconds until nothing is left
AGAIN = "rerun the same command"
RESUME = f"{AGAIN} to resume from there"
# What each signal ends in: exit code, status, the first words of the line.
SIGNALS = {
    signal.SIGINT: (130, "interrupted", "interrupted: Ctrl-C (SIGINT)"),
    signal.SIGTERM: (143, "stopped", "stopped: SIGTERM"),
    signal.SIGUSR1: (143, "stopped", "stopped: SIGUSR1"),
}
# Where a run is, and what it has kept there; of training, the steps that it had done by then.
STEPS = r"data done, prune saved at step (\d+)"
KEPT = {
    "start": "all as it was",
    "connect": "no stage done",
    "data": "no stage done",
    "training": STEPS,
    "checkpoint": STEPS,
    "evaluation": "data, dense, prune done",
    "export": "data, dense, prune, evaluate done",
    "report": "data, dense, prune, evaluate, export done",
}
STEPPING = ("training", "checkpoint")
EARLY = ("start", "connect", "data")  # there is nothing before them
LATE = {"evaluation": 3, "export": 4, "report": 5}  # how many stages are
STAGES = ("data", "dense", "prune", "evaluate", "export", "report")


@pytest.fixture
def start(project, tmp_path, monkeypatch):
    """Start `mgpp run`, held in a phase; it has come to it by the time it is returned."""
    drivers = []

    def begin(phase, *overrides):
        storage, held = tmp_path / "runs", tmp_path / "held"
        if phase in LATE:
            copy_stages(project / "runs", storage, LATE[phase])
        if phase in STEPPING:
            overrides = (*LONGER, *overrides)
        monkeypatch.setenv("PYTHONPATH", HELD)
        monkeypatch.setenv("MGPP_TEST_PHASE", phase)
        monkeypatch.setenv("MGPP_TEST_HELD", str(held))
        where = [f"storage={storage}", "cluster.gpus_per_worker=0"]
        command = [MGPP, "run", str(project / "run.yaml"), *OVERRIDES, *where, *overrides, "--json"]
        driver = Driver(command, storage)
        drivers.append(driver)
        if phase == "training":
            driver.wait_for(3)
        else:
            for _ in driver._until(240, f"{phase} was not reached"):
                if held.is_dir() and list(held.iterdir()):
                    break
        return driver

    yield begin
    for driver in drivers:
        driver.__exit__()


def copy_stages(storage, to, count):
    """Copy what a run's first stages made, so that they are not run again."""
    for stage in STAGES[:count]:
        for folder in storage.glob(f"{stage}-*"):
            shutil.copytree(folder, to / folder.name)


def send(driver, number):
    """Send a signal as it comes: Ctrl-C goes to all of the terminal's process group."""
    if number == signal.SIGINT:
        os.killpg(driver.process.pid, number)
    else:
        driver.process.send_signal(number)


def told(driver, timeout=120.0):
    """Wait for the end; return the exit code, the line and the object that tell it, and the log."""
    code, log = driver.end(timeout)
    left = driver.left_after(WAY_OUT)
    assert not left, (left, log[-3000:])
    lines = [line for line in log.splitlines() if line.startswith(TOLD)]
    objects = [json.loads(line) for line in log.splitlines() if line.startswith('{"status"')]
    assert len(lines) == len(objects) == 1, log[-4000:]
    assert "Traceback" not in log, log[-6000:]
    return code, lines[0], objects[0], log


def check(driver, number, phase):
    code, line, values, log = told(driver)
    expected_code, status, words = SIGNALS[number]
    again = AGAIN if phase == "start" else RESUME
    match = re.fullmatch(rf"{re.escape(words)}; kept: {KEPT[phase]}; {again}", line)
    assert match, line
    assert (code, values["status"], values["exit_code"]) == (expected_code, status, code)
    assert values["kept"] in line
    assert not list(driver.storage.glob("*/_LEASE*")), "leases are given back"
    return match, log


# Of every kind one by `make test`.


def test_a_stop_in_training_keeps_the_step_under_way(start):
    driver = start("training", "train.checkpoint_every=1000")
    driver.process.send_signal(signal.SIGTERM)
    match, log = check(driver, signal.SIGTERM, "training")
    assert int(match[1]) >= 3
    assert "SIGTERM: the step under way is finished and saved, for which there are 120 s" in log


def test_an_interrupt_ends_a_command_that_has_not_begun_to_work(start):
    driver = start("start")
    send(driver, signal.SIGINT)
    check(driver, signal.SIGINT, "start")


# The table of ends.


@torture
@pytest.mark.parametrize("phase", KEPT)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_driver(summary, start, number, phase):
    driver = start(phase)
    send(driver, number)
    check(driver, number, phase)


@torture
@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_was_stopped_ends_as_if_it_never_was(project, undisturbed, start, number):
    driver = start("training", "train.checkpoint_every=1000")
    send(driver, number)
    (step,) = check(driver, number, "training")[0].groups()
    with run_in_background(project, driver.storage, *LONGER) as again:
        code, log = again.end()
    assert code == 0, log[-4000:]
    assert f"resuming from the checkpoint of step {step}" in log
    assert outcome(driver.storage) == undisturbed


@torture
@pytest.mark.parametrize("phase", ["training", "checkpoint"])
def test_a_second_signal_ends_at_once(start, phase):
    driver = start(phase)
    for worker in driver.processes("RayTrainWorker"):
        os.kill(worker, signal.SIGSTOP)  # so that nothing is saved
    driver.process.send_signal(signal.SIGTERM)
    driver.wait_until_told("a second signal ends at once")
    driver.process.send_signal(signal.SIGTERM)
    code, line, *_ = told(driver, 30)
    assert (code, line.partition(";")[0]) == (143, "stopped: SIGTERM")


@torture
def test_the_grace_is_the_most_that_a_stop_takes(start):
    driver = start("training", "cluster.stop_grace_s=3")
    for worker in driver.processes("RayTrainWorker"):
        os.kill(worker, signal.SIGSTOP)
    driver.process.send_signal(signal.SIGTERM)
    code, line, *_ = told(driver, 30)
    assert (code, line.partition(";")[0]) == (
        143,
        "stopped: SIGTERM (cluster.stop_grace_s was over)",
    )


@torture
@pytest.mark.parametrize("phase", KEPT)
def test_a_killed_driver_leaves_no_process(summary, start, phase):
    driver = start(phase)
    driver.process.kill()
    driver.process.wait(30)
    left = driver.left_after(WAY_OUT)
    assert not left


@torture
@pytest.mark.parametrize("phase", ["training", "checkpoint", "evaluation"])
def test_a_killed_worker_is_a_failure_where_none_is_allowed(summary, start, phase):
    driver = start(phase, "cluster.max_failures=0")
    assert driver.kill("RayTrainWorker") >= 1
    code, line, values, _ = told(driver)
    assert (code, values["status"]) == (1, "failed")
    assert line.startswith(
        "error: workers failed more often than cluster.max_failures (0) allows; "
    )
    assert re.search(f"kept: {KEPT[phase] if phase == 'evaluation' else 'data done'}", line)


@torture
@pytest.mark.parametrize(
    "phase", ["data", "training", "checkpoint", "evaluation", "export", "report"]
)
def test_a_killed_raylet_is_a_failure(summary, start, phase):
    driver = start(phase)
    assert driver.kill("raylet/raylet") >= 1
    code, line, values, _ = told(driver)
    assert (code, values["status"]) == (1, "failed")
    assert re.match(
        r"error: Ray's process of this machine \(raylet, \d+\) was killed or failed; ", line
    )
    assert re.search(f"kept: {KEPT[phase] if phase in (*EARLY, *LATE) else 'data done'}", line)
    assert line.endswith(RESUME)


@torture
@pytest.mark.parametrize("phase", ["data", "training", "export"])
def test_a_lease_that_another_run_took(summary, start, phase):
    driver = start(phase)
    (lease,) = driver.storage.glob(
        "prune-*/_LEASE.1.json" if phase == "training" else "*/_LEASE.1.json"
    )
    lease.with_name("_LEASE.2.json").write_bytes(lease.read_bytes())
    code, line, values, _ = told(driver)
    assert (code, values["status"]) == (1, "failed")
    assert line.startswith(
        f"error: {lease.parent}: another run took over: this run's lease expired"
    )
    assert AGAIN in line


@torture
@pytest.mark.parametrize("problem", ["full", "read-only"])
@pytest.mark.parametrize("phase", ["data", "checkpoint", "export"])
def test_a_disk_that_takes_no_more(summary, start, monkeypatch, phase, problem):
    monkeypatch.setenv("MGPP_TEST_DISK", problem)
    driver = start(phase)
    code, line, values, _ = told(driver)
    assert (code, values["status"]) == (1, "failed")
    words = {"full": "No space left on device", "read-only": "Read-only file system"}[problem]
    assert re.search(rf"could not (write to|be written) .*{re.escape(words)}", line), line
    assert "same command" in line
