"""Child processes of tests: each has a timeout and is reaped with all that it started."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # what runs on ranks needs none
    import pytest

ROOT = Path(__file__).resolve().parent.parent
MGPP = str(Path(sys.executable).with_name("mgpp"))
# Parts of commands.
_STARTS_RANKS = ("torch.distributed.run", "tests.fork_ranks", "/ray/core/src/ray/", MGPP)


def run(
    command: Sequence[str],
    *,
    timeout: float,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    umask: int = -1,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own; kill it all at the end.

    Unless given, the working folder is the project's root, and the umask that of the tests.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        umask=umask,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        out, err = _ended(process)
        raise AssertionError(
            f"{command} ran past {timeout} s:\n{out[-4000:]}\n{err[-4000:]}"
        ) from None
    finally:
        _kill_group(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def signals_not_ignored() -> Iterator[None]:
    """Have what the block starts take Ctrl-C, also where a shell has these tests ignore it (`&`)."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def torchrun(module: str, *args: str, num_processes: int, timeout: float) -> None:
    """Run a module on several ranks and assert that all ended well."""
    command = torchrun_command(module, *args, num_processes=num_processes)
    done = run(command, timeout=timeout, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


def torchrun_command(module: str, *args: str, num_processes: int) -> list[str]:
    """Return the command that runs a module on several ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={num_processes}", "-m", module, *args]


def ranks_command(module: str, *args: str, num_processes: int) -> list[str]:
    """Return the command that runs a module's `main` on several ranks, with less to import."""
    return [sys.executable, "-m", "tests.fork_ranks", str(num_processes), module, *args]


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def forbid_ranks(patch: "pytest.MonkeyPatch") -> None:
    """Refuse to start Ray, ranks of torchrun and `mgpp`, in a test that is not marked as distributed."""
    start = subprocess.Popen.__init__

    def checked_start(self: Any, args: Any, *more: Any, **settings: Any) -> None:
        command = args if isinstance(args, str) else " ".join(map(os.fsdecode, args))
        if any(part in command for part in _STARTS_RANKS):
            raise AssertionError(f"mark the test as distributed: it starts {command}")
        start(self, args, *more, **settings)

    patch.setattr(subprocess.Popen, "__init__", checked_start)


def leave() -> NoReturn:
    """End a rank that has done all it has to do.

    Without the interpreter's teardown: gloo's threads of groups that DeepSpeed still holds may
    abort the rank there (seen once).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process that ran too long; return what it printed.

    torchrun's ranks are in sessions of their own, and only itself ends them, if it is asked to.
    """
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
