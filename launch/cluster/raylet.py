"""Ray's process of this node, which a driver needs.

Where it ends, Ray's library ends the driver at its next look at shared memory, by `_exit` in C++: without
an exception, so that nobody would say what happened. Its end is waited for here, and comes first.
"""

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

_LOOK_SECONDS = 1.0


@contextmanager
def watched_raylet(lost: Callable[[str], None]) -> Iterator[None]:
    """Call `lost`, with what happened, if the raylet of this node ends while the block runs."""
    pid = _pid_of_raylet()
    if pid is None:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(pid, ended, lost), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join(2 * _LOOK_SECONDS)  # Ray is shut down next, which is no loss


def _watch(pid: int, ended: threading.Event, lost: Callable[[str], None]) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not ended.is_set():
            if poll.poll(_LOOK_SECONDS * 1000) and not ended.is_set():
                lost(f"Ray's process of this machine (raylet, {pid}) was killed or failed")
                return
    finally:
        os.close(descriptor)


def _pid_of_raylet() -> int | None:
    """Return the raylet's process; None where it is none of this machine, as for a client of Ray."""
    node = ray._private.worker._global_node
    if node is None:
        return None
    mark = f"--raylet_socket_name={node.raylet_socket_name}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # it ended meanwhile
            continue
    return None
