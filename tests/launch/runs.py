"""`mgpp` in the background, for tests that kill it or what it runs on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from pipeline.store.artifacts import open_artifact
from pipeline.tracking.recorder import read_records
from tests.processes import MGPP, signals_not_ignored

# None of these changes what comes out.
OVERRIDES = ["train.checkpoint_every=2", "train.log_every=1"]

# Long enough to lose a node in the middle of it.
LONGER = ["train.length=160", "dense.enabled=false"]

# Seconds after which a command is taken for hung: many times what it takes on a machine of its own,
# less than the limit of a whole test.
HUNG = 480.0


class Driver:
    """A command in the background; all processes it starts carry a mark in their environment.

    Args:
        command: what to run.
        storage: of the run; the log lies beside it.
    """

    def __init__(self, command: Sequence[str], storage: Path) -> None:
        self.mark = f"MGPP_TEST={uuid.uuid4().hex}"
        self.storage = storage
        self.log = storage.parent / "driver.log"
        name, _, value = self.mark.partition("=")
        with self.log.open("ab") as log, signals_not_ignored():
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "HF_HUB_OFFLINE": "1", name: value},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill("")
        self.process.wait(timeout=30)

    def kill(self, title: str) -> int:
        """SIGKILL every process that carries the mark and whose command line holds `title`."""
        killed = 0
        for pid in self.processes(title):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
                killed += 1
        return killed

    def processes(self, title: str = "") -> dict[int, str]:
        """Return the command lines, by id, of processes that carry the mark and hold `title`."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended meanwhile
            if marked and title in command:
                found[int(folder.name)] = command
        return found

    def left_after(self, seconds: float) -> dict[int, str]:
        """Wait for processes that carry the mark to end; return those that have not by then."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def wait_for(self, step: int, timeout: float = HUNG) -> None:
        """Wait until the newest attempt has recorded a step."""
        for _ in self._until(timeout, f"step {step} was not reached"):
            files = self.storage.glob("prune-*/a-*/metrics.jsonl")
            newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
            if newest and newest.stat().st_size and last_step(newest) >= step:
                return

    def wait_until_told(self, text: str, timeout: float = HUNG) -> None:
        """Wait until the log holds a text."""
        for _ in self._until(timeout, f"never told {text!r}"):
            if text in self.log.read_text():
                return

    def wait_until_shown(self, stage: str, step: int, timeout: float = HUNG) -> None:
        """Wait until the log shows that a stage has come to a step, or past it: not all are shown."""
        pattern = re.compile(rf"^{stage} +step (\d+)/", re.MULTILINE)
        for _ in self._until(timeout, f"step {step} of {stage} was not shown"):
            if any(int(found) >= step for found in pattern.findall(self.log.read_text())):
                return

    def _until(self, timeout: float, failure: str) -> Iterator[None]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            yield
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.05)
        raise AssertionError(f"{failure}:\n{self.log.read_text()[-4000:]}\n{_state()}")

    def end(self, timeout: float = 600) -> tuple[int, str]:
        """Wait for the command's end; return its exit code and its log."""
        return self.process.wait(timeout=timeout), self.log.read_text()


def run_in_background(project: Path, storage: Path, *overrides: str, inside: Sequence[str] = ()):
    """Start `mgpp run` on the project, `inside` another command."""
    command = [*inside, MGPP, "run", str(project / "run.yaml"), *OVERRIDES]
    return Driver([*command, f"storage={storage}", *overrides], storage)


def run_on(project: Path, storage: Path, cluster, *overrides: str):
    """Start a longer `mgpp run` on a cluster of this machine."""
    where = f"cluster.address={cluster.address}"
    return run_in_background(project, storage, *LONGER, where, *overrides)


def last_step(path: Path) -> int:
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else -1


def outcome(storage: Path):
    (folder,) = storage.glob("prune-*")
    artifact = open_artifact(str(folder))
    records = read_records(artifact.path / "metrics.jsonl")
    weights = json.loads((artifact.path / "weights.json").read_text())
    return weights, artifact.metrics, records["prune"], records["layers"]


def _state() -> str:
    """What tells a process that hangs from one that got no processor; the end of the workers' logs."""
    lines = ["pid, nice, processor seconds, state, command:"]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            used = sum(process.cpu_times()[:2])
            if used > 1:
                title = " ".join(process.cmdline())[:80]
                lines.append(
                    f"{process.pid} {process.nice()} {used:.0f} {process.status()} {title}"
                )
    session = Path("/tmp/ray/session_latest/logs").resolve()
    logs = sorted([*session.glob("train/*worker*.log"), *session.glob("worker-*.err")])
    lines += [f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs]
    return "\n".join(lines)
