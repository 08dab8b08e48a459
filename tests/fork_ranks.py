"""Run a module's `main` on several ranks, forked from one process that has imported it.

    python -m tests.fork_ranks 2 tests.some_worker argument ...

As torchrun would, but the imports, which take longer than most of what tests do, are made once.
"""

import os
import signal
import socket
import sys
import time
import traceback
from importlib import import_module
from typing import Any

from tests.processes import leave

# What libraries import at their first use, by the library.
_LATE = {
    "transformers": ("transformers.models.bert.modeling_bert", "deepspeed"),
    "deepspeed": ("deepspeed.runtime.zero.muon.muon_optimizer",),
}
_GRACE = 20.0  # seconds in which ranks may end after one has failed


def main(num_processes: int, module: str, *arguments: str) -> int:
    """Return 0 if all ranks ended well; the others are ended when one fails."""
    work = import_module(module).main
    for library, late in _LATE.items():
        if library in sys.modules:
            for name in late:
                import_module(name)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    ranks = {_fork(rank, work, arguments) for rank in range(num_processes)}
    signal.signal(signal.SIGTERM, lambda *_: _signal(ranks, signal.SIGTERM))
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = True
            _end(ranks)
    return int(failed)


def _fork(rank: int, work: Any, arguments: tuple[str, ...]) -> int:
    pid = os.fork()
    if not pid:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        try:
            work(*arguments)
        except BaseException:  # noqa: BLE001  (printed as the interpreter would)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        leave()
    return pid


def _end(ranks: set[int]) -> None:
    """Ask ranks to end, and kill those that do not."""
    _signal(ranks, signal.SIGTERM)
    ends = time.monotonic() + _GRACE
    while ranks and time.monotonic() < ends:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        ranks.discard(pid)
        time.sleep(0.02)
    _signal(ranks, signal.SIGKILL)


def _signal(ranks: set[int], number: signal.Signals) -> None:
    for pid in ranks:
        os.kill(pid, number)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
