"""Cases that ranks go through one after another, each with an outcome of its own.

A case that raises, hangs or ends its process takes the ranks with it: collectives that one rank has left
cannot be trusted. The launcher then starts new ranks for the cases after it.
"""

import faulthandler
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import leave, ranks_command, run

_GRACE = 2.0  # seconds in which the other ranks of a failed case may write how it ended for them
_LEFT = "left.json"


# Launching.


@dataclass(frozen=True)
class Launched:
    """The folder that cases wrote into, and what is wrong with those that did not pass."""

    root: Path
    problems: Mapping[str, str] = field(default_factory=dict)

    def folder(self, *cases: str) -> Path:
        """Return the folder.

        Raises:
            AssertionError: if one of the cases did not pass, with the tracebacks of its ranks.
        """
        for case in cases:
            if case in self.problems:
                raise AssertionError(f"case {case}: {self.problems[case]}")
        return self.root

    def __or__(self, other: "Launched") -> "Launched":
        """Return the outcomes of two launches that wrote into one folder."""
        return Launched(self.root, {**self.problems, **other.problems})


def launch_cases(
    module: str,
    *args: str,
    cases: Iterable[str],
    folder: Path,
    num_processes: int,
    timeout: float,
    max_failures: int = 3,
) -> Launched:
    """Run a module whose `main` calls `run_cases` on ranks, again for what is left after a failure.

    Args:
        args: of the module.
        cases: names of cases of the module, in its order.
        folder: what the cases write into; their outcomes go to `outcomes` in it.
        timeout: seconds that all launches together may take.
        max_failures: after so many failed cases the others are not run.
    """
    outcomes = folder / "outcomes"
    outcomes.mkdir(parents=True, exist_ok=True)
    problems: dict[str, str] = {}
    left, deadline = list(cases), time.monotonic() + timeout
    while left and len(problems) < max_failures and time.monotonic() < deadline:
        (outcomes / _LEFT).write_text(json.dumps(left))
        try:
            done = run(
                ranks_command(module, *args, num_processes=num_processes),
                timeout=deadline - time.monotonic(),
                env={"OMP_NUM_THREADS": "1"},
            )
            printed = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        except AssertionError as error:  # ran too long
            printed = str(error)
        unpassed = [case for case in left if not _has_passed(outcomes, case, num_processes)]
        if unpassed:
            problems[unpassed[0]] = _problem(outcomes, unpassed[0], num_processes, printed)
        left = unpassed[1:]
    problems |= {case: f"not run; before it failed {sorted(problems)}" for case in left}
    return Launched(folder, problems)


def _has_passed(outcomes: Path, case: str, num_processes: int) -> bool:
    paths = [outcomes / f"{case}.{rank}" for rank in range(num_processes)]
    return all(path.exists() and path.read_text() == "passed" for path in paths)


def _problem(outcomes: Path, case: str, num_processes: int, printed: str) -> str:
    """Return what each rank wrote of a case, and what was printed if that explains nothing."""
    texts = []
    for rank in range(num_processes):
        path, stacks = outcomes / f"{case}.{rank}", outcomes / f"{case}.{rank}.stacks"
        text = path.read_text() if path.exists() else "had not begun"
        texts.append(f"{text}\n{stacks.read_text()}" if stacks.exists() else text)
    ranks = "\n".join(f"rank {rank} {text}" for rank, text in enumerate(texts))
    explained = any(text.count("\n") > 1 for text in texts)
    return ranks if explained else f"{ranks}\n{printed}"


# In the ranks.


def run_cases(folder: Path, cases: Mapping[str, Callable[[], object]], seconds: float) -> None:
    """Run on this rank the cases that are left of those asked for, write how each ended, and leave.

    Args:
        folder: as of `launch_cases`.
        cases: by name, in the same order on all ranks.
        seconds: that a case may take before it counts as hung; its stacks are written then.
    """
    outcomes = folder / "outcomes"
    left = json.loads((outcomes / _LEFT).read_text())
    gc.collect()
    gc.freeze()  # what libraries made is passed over by each later collection, of which cases make many
    for name, work in cases.items():
        if name in left:
            _run_case(outcomes, name, work, seconds)
    leave()


def _run_case(outcomes: Path, name: str, work: Callable[[], object], seconds: float) -> None:
    rank = os.environ["RANK"]
    outcome = outcomes / f"{name}.{rank}"
    outcome.write_text("was running")
    with (outcomes / f"{name}.{rank}.stacks").open("w") as stacks:
        faulthandler.dump_traceback_later(seconds, exit=True, file=stacks)
        # Where this rank waits when another has failed. It goes on: its collective is about to raise,
        # and what does not is killed later.
        faulthandler.register(signal.SIGTERM, file=stacks, chain=False)
        try:
            work()
        except Exception:  # noqa: BLE001  (reported as this case's)
            outcome.write_text(f"failed:\n{traceback.format_exc()}")
            _await_others(outcomes, name)
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGTERM)
    outcome.write_text("passed")


def _await_others(outcomes: Path, name: str) -> None:
    """Wait a while for ranks that may be about to fail too: the first to end ends them all."""
    paths = [outcomes / f"{name}.{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
    ends = time.monotonic() + _GRACE
    while time.monotonic() < ends and any(
        not path.exists() or path.read_text() in ("", "was running") for path in paths
    ):
        time.sleep(0.05)
