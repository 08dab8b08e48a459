"""Run a module's `main` on several ranks, forked from one process that has imported it.

    python -m tests.fork_ranks 2 tests.some_worker argument ...

As torchrun would, but what the module imports, which takes longer than most of what tests do, is
imported once; so are the modules it names in SLOW_IMPORTS.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module

from torch.multiprocessing import start_processes

from tests.processes import free_port, leave

_GRACE = (
    5.0  # seconds that ranks have to end by themselves when one has failed, and again once told to
)


def main(num_processes: int, module: str, *arguments: str) -> None:
    """Return when all ranks have ended well; when one fails the others are ended.

    Raises:
        Exception: naming the first rank that failed.
    """
    worker = import_module(module)
    for name in getattr(worker, "SLOW_IMPORTS", ()):
        import_module(name)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    ranks = start_processes(
        _run_rank, (worker.main, arguments), nprocs=num_processes, join=False, start_method="fork"
    )
    while not ranks.join(grace_period=_GRACE):
        pass


def _run_rank(rank: int, work: Callable[..., None], arguments: tuple[str, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    work(*arguments)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
