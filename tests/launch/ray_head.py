"""A Ray head node on this machine, its dashboard on loopback, ended with all that it started."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes import free_port


@dataclass(frozen=True)
class Head:
    """Addresses of a head node: of its GCS, and of its dashboard."""

    address: str
    dashboard: str


@contextmanager
def ray_head(num_cpus: int = 4, env: Mapping[str, str] | None = None) -> Iterator[Head]:
    """Start a head node for as long as the block runs."""
    binaries = str(Path(sys.executable).parent)
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        log = Path(folder) / "head.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [
                    f"{binaries}/ray",
                    "start",
                    "--head",
                    "--block",
                    "--node-ip-address=127.0.0.1",
                    f"--port={port}",
                    "--dashboard-host=127.0.0.1",
                    f"--dashboard-port={dashboard}",
                    f"--dashboard-agent-listen-port={free_port()}",  # another Ray may have the usual one
                    f"--num-cpus={num_cpus}",
                    f"--temp-dir={folder}/ray",
                    "--disable-usage-stats",
                ],
                env={
                    **os.environ,
                    "PATH": f"{binaries}:{os.environ['PATH']}",
                    "HF_HUB_OFFLINE": "1",
                    **(env or {}),
                },
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            head = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
            _wait_for(head, process, log)
            yield head
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # SIGTERM waits long for what is still in use
            process.wait(timeout=10)
            _kill_all_that_name(folder)


def _wait_for(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{head.dashboard}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it asks for a token, so it is there
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no dashboard after two minutes:\n{log.read_text()[-4000:]}")


def _kill_all_that_name(folder: str) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if folder.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
