"""Ends of a command, each told once: by a line, one JSON object and an exit code; of small programs."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import textwrap
import time
import traceback

import pytest
import typer

import launch.cli.ends  # noqa: F401  # before the forks
import pipeline.errors  # noqa: F401

BEGIN = """
import os, signal, sys, threading, time
from launch.cli import ends
from launch.cli.ends import reported_errors
from launch.driver import stopping
from pipeline.errors import ConfigError, Problem, RunStoppedError, StageError
stopping._WAY_OUT_SECONDS = ends._KEPT_SECONDS = 0.3
def send(*numbers, every=0.1):
    def work():
        for number in numbers:
            time.sleep(every)
            os.kill(os.getpid(), number)
    threading.Thread(target=work, daemon=True).start()
def told(text):
    print(text, file=sys.stderr, flush=True)
with reported_errors(True, of_run=True) as end:
    end.resumable(lambda: "prune saved at step 7")
    print("of a library")
"""
AGAIN = "rerun the same command to resume from there"
KEPT = f"kept: prune saved at step 7; {AGAIN}"


def ended(body, before=BEGIN):
    """Run a program in a fork, which has all imported.

    Returns:
        Its exit code, the lines that tell the end, the object, and all that people see.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            program = before + textwrap.indent(textwrap.dedent(body), "    ")
            _run(program, out.fileno(), err.fileno())
        try:
            code = _code_of(pid, timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    (values,) = [json.loads(line) for line in texts[0].splitlines()]
    starts = ("done: ", "error: ", "stopped: ", "interrupted: ")
    lines = [line for line in texts[1].splitlines() if line.startswith(starts)]
    return code, lines, values, texts[1]


def _run(program, out, err):
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        exec(program, {})
        code = 0
    except typer.Exit as left:
        code = left.exit_code
    except BaseException:  # noqa: BLE001  # whose end is the test's matter
        traceback.print_exc()
    finally:
        os._exit(code)


def _code_of(pid, timeout):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    raise AssertionError(f"it runs for more than {timeout} s")


@pytest.mark.parametrize(
    ("body", "code", "status", "line"),
    [
        ("end.done({'status': 'done'}, 'all stages')", 0, "done", "done: all stages"),
        ("raise StageError('out of room')", 1, "failed", f"error: out of room; {KEPT}"),
        (
            "raise StageError('lost; the same command runs it again')",
            1,
            "failed",
            "error: lost; the same command runs it again; kept: prune saved at step 7",
        ),
        ("raise KeyError('a')", 1, "failed", f"error: KeyError: 'a'; {KEPT}"),
        (
            "raise ConfigError([Problem('train.lr', 'is below 0')])",
            2,
            "failed",
            "error: train.lr: is below 0",
        ),
        (
            "send(signal.SIGINT); time.sleep(60)",
            130,
            "interrupted",
            f"interrupted: Ctrl-C (SIGINT); {KEPT}",
        ),
        ("send(signal.SIGTERM); time.sleep(60)", 143, "stopped", f"stopped: SIGTERM; {KEPT}"),
        ("send(signal.SIGUSR1); time.sleep(60)", 143, "stopped", f"stopped: SIGUSR1; {KEPT}"),
        (
            "threading.Timer(0.2, end.lost, ['raylet ended']).start(); time.sleep(60)",
            1,
            "failed",
            f"error: raylet ended; {KEPT}",
        ),
        (  # what should let go does not
            "send(signal.SIGTERM)\nwhile 1:\n try: time.sleep(60)\n except KeyboardInterrupt: pass",
            143,
            "stopped",
            f"stopped: SIGTERM; {KEPT}",
        ),
        (
            "end.resumable(lambda: time.sleep(60)); raise StageError('no answer')",
            1,
            "failed",
            f"error: no answer; kept: unknown (storage does not answer); {AGAIN}",
        ),
    ],
)
def test_an_end_is_a_line_an_object_and_a_code(body, code, status, line):
    found, lines, values, err = ended(body)
    assert (found, values["status"], lines) == (code, status, [line]), err
    assert ("Traceback" in err) == ("KeyError" in body)
    assert "of a library" in err
    if status != "done":
        assert values["exit_code"] == code
        assert values["happened"] in line


def test_what_is_more_than_a_line_comes_before_it():
    _, lines, values, err = ended("raise StageError('two workers failed\\nas follows\\nhere')")
    assert err.splitlines()[-1] == f"error: two workers failed; {KEPT}"
    assert lines == err.splitlines()[-1:]
    assert "as follows\nhere\n" in err
    assert values["errors"] == ["two workers failed\nas follows\nhere"]


# Steps that can be kept: the first signal asks for that, the second ends at once.

PATIENT = """
with end.signals.patient({ask}, {grace}, told):
    send({signals})
    {work}
end.done({{'status': 'done'}}, 'all')
"""
ASKED = "lambda: asked.set() or True"


def patient(*, ask=ASKED, grace=60, signals, work):
    return "asked = threading.Event()\n" + PATIENT.format(
        ask=ask, grace=grace, signals=", ".join(f"signal.{name}" for name in signals), work=work
    )


def test_work_that_ends_when_it_is_asked_to_is_waited_for():
    work = "asked.wait(60); told('the step is saved'); raise RunStoppedError('saved')"
    code, lines, values, err = ended(patient(signals=["SIGTERM"], work=work))
    assert (code, values["status"], lines) == (143, "stopped", [f"stopped: SIGTERM; {KEPT}"]), err
    said = err.splitlines()
    waits = next(
        line for line in said if line.startswith("SIGTERM: the step under way is finished")
    )
    assert "60 s (cluster.stop_grace_s); a second signal ends at once" in waits
    assert said.index(waits) < said.index(lines[0])


def test_a_signal_that_comes_as_the_work_is_done_still_ends_the_command():
    """What follows would not be kept by steps."""
    work = "asked.wait(60)"
    code, lines, *_ = ended(patient(signals=["SIGINT"], work=work))
    assert (code, lines) == (130, [f"interrupted: Ctrl-C (SIGINT); {KEPT}"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"signals": ["SIGTERM", "SIGTERM"]}, "SIGTERM"),
        ({"signals": ["SIGTERM", "SIGINT"]}, "SIGTERM"),
        ({"signals": ["SIGTERM"], "grace": 0.5}, "SIGTERM (cluster.stop_grace_s was over)"),
        ({"signals": ["SIGTERM"], "grace": 0}, "SIGTERM"),
        ({"signals": ["SIGTERM"], "ask": "lambda: False"}, "SIGTERM"),
        ({"signals": ["SIGTERM"], "ask": "lambda: 1 / 0"}, "SIGTERM"),
    ],
)
def test_it_ends_at_once_where_there_is_nothing_to_wait_for_or_no_time(changes, told):
    since = time.monotonic()
    code, lines, _, err = ended(patient(work="time.sleep(60)", **changes))
    assert (code, lines) == (143, [f"stopped: {told}; {KEPT}"]), err
    assert time.monotonic() - since < 60


def test_work_that_another_run_took_over_is_a_failure():
    body = """
    def lose():
        end.signals.give_up()
    threading.Timer(0.2, lose).start()
    try:
        with end.signals.patient(lambda: True, 60, told):
            time.sleep(60)
    except KeyboardInterrupt:
        raise StageError('another run took over') from None
    """
    code, lines, values, _ = ended(body)
    assert (code, values["status"], lines) == (
        1,
        "failed",
        [f"error: another run took over; {KEPT}"],
    )


def test_what_the_shell_has_it_ignore_it_ignores():
    body = "send(signal.SIGINT); time.sleep(1); end.done({'status': 'done'}, 'all')"
    before = BEGIN.replace("with rep", "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwith rep")
    code, lines, *_ = ended(body, before)
    assert (code, lines) == (0, ["done: all"])


def test_a_signal_before_the_command_has_begun_is_told_too():
    before = """
import os, signal, sys, time
from launch.cli.ends import tell_before_it_begins
tell_before_it_begins(["mgpp", "run", "--json"])
if True:
"""
    code, lines, values, _ = ended("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)", before)
    assert (code, values["status"]) == (143, "stopped")
    assert lines == ["stopped: SIGTERM; kept: all as it was; rerun the same command"]


def test_a_signal_after_the_end_changes_nothing_of_what_was_told():
    before = BEGIN.replace(
        "with rep",
        'from launch.cli.ends import tell_before_it_begins\ntell_before_it_begins(["--json"])\nwith rep',
    )
    body = (
        "end.done({'status': 'done'}, 'all'); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)"
    )
    code, lines, values, _ = ended(body, before)
    assert (code, lines, values) == (0, ["done: all"], {"status": "done"})
