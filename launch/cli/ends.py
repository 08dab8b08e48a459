"""How a command ends: one line for people, one JSON object for other tools, and an exit code.

error: <what happened>; kept: <what is saved>; <what to do>          1, 2
stopped: SIGTERM; kept: ...; rerun the same command to resume        143
interrupted: Ctrl-C (SIGINT); kept: ...; ...                         130
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from launch.driver.stopping import NAMES, AtOnce, Interrupted, StopSignals

Status = Literal["done", "failed", "stopped", "interrupted", "invalid"]
AGAIN = "rerun the same command"
_KEPT_SECONDS = 3.0  # storage that does not answer must not keep a command from ending


@dataclass(frozen=True, kw_only=True)
class End:
    """How a command ended.

    Attributes:
        status: in one word; `invalid`: bad input to a command that runs nothing.
        code: the exit code.
        happened: what ended it.
        kept: what is saved.
        todo: what to do.
        more: further values of the JSON object.
    """

    status: Status
    code: int
    happened: str
    kept: str = ""
    todo: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line."""
        word = "error" if self.status in ("failed", "invalid") else self.status
        kept = f"kept: {self.kept}" if self.kept else ""
        return f"{word}: {'; '.join(filter(None, [self.happened, kept, self.todo]))}"

    def as_data(self) -> dict[str, Any]:
        """Return it for other tools."""
        words = {"happened": self.happened, "kept": self.kept, "todo": self.todo}
        return {"status": self.status, **words, "exit_code": self.code, **self.more}


class Ending:
    """The end of this command, whatever it will be.

    Args:
        as_json: whether the end is also one JSON object on standard output.
        of_run: whether it is a command that runs something, of which something may be kept.

    Attributes:
        signals: that it got.
        kept: returns what is saved, once that is known.
        todo: what to do about an early end.
    """

    def __init__(self, *, as_json: bool, of_run: bool) -> None:
        self.signals = StopSignals()
        self.signals.overdue = self._leave_at_once
        self.kept: Callable[[], str] = lambda: "all as it was" if of_run else ""
        self.todo = AGAIN if of_run else ""
        self.of_run = of_run
        self._as_json = as_json
        self._out = os.dup(1)
        self._lock = threading.Lock()
        self._is_told = False
        if as_json:
            sys.stdout.flush()
            os.dup2(2, 1)  # whatever libraries and child processes print goes to standard error

    def resumable(self, kept: Callable[[], str]) -> None:
        """Say from now on that the same command resumes from what is saved, which `kept` returns."""
        self.kept, self.todo = kept, f"{AGAIN} to resume from there"

    def __call__(self, values: Mapping[str, Any]) -> None:
        """Write the values of a command that is done."""
        self.signals.close()
        with self._lock:
            self._is_told = True
        self._emit(values)

    def done(self, values: Mapping[str, Any], happened: str) -> None:
        """End a run that is done."""
        self.signals.close()
        _print(f"done: {happened}")
        self(values)

    def tell(self, end: End) -> None:
        """Write how the command ended, once."""
        with self._lock:
            if self._is_told:
                return
            self._is_told = True
        _print(str(end))
        self._emit(end.as_data())

    def of(self, error: BaseException) -> End:
        """Return the end that an error is; of a run's, what is more than a line is printed before it."""
        from pipeline.errors import ConfigError, RunStoppedError, StageError

        if isinstance(error, ConfigError):
            return self._of_bad_input(error.problems)
        if isinstance(error, Interrupted) or (
            isinstance(error, RunStoppedError) and self.signals.number
        ):
            return self._of_signal()
        if isinstance(error, KeyboardInterrupt):
            return self._of_signal(signal.SIGINT)
        if isinstance(error, StageError):
            text = str(error)
        elif _is_rays(error):
            text = f"Ray failed: {type(error).__name__}: {error}"
        else:
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {error}"
        first, _, details = text.strip().partition("\n")
        if not self.of_run or not details:
            return self._failed(text, errors=[text])
        _print(details)
        return self._failed(first, errors=[text])

    def lost(self, what: str) -> NoReturn:
        """End at once, from any thread: what the command needs is gone."""
        self.tell(self._failed(what, errors=[what]))
        os._exit(1)

    def close(self) -> None:
        """Release standard output."""
        os.close(self._out)

    def _of_bad_input(self, problems: list[Any]) -> End:
        for problem in problems[:-1]:
            _print(f"error: {problem}")
        return End(
            status="failed" if self.of_run else "invalid",
            code=2,
            happened=str(problems[-1]) if problems else "",
            more={
                "errors": [str(problem) for problem in problems],
                "problems": [problem.as_data() for problem in problems],
            },
        )

    def _of_signal(self, number: int | None = None) -> End:
        over = " (cluster.stop_grace_s was over)" if self.signals.over_grace else ""
        return end_of_signal(
            self.signals.number or number or signal.SIGTERM,
            over=over,
            kept=self._what_is_kept(),
            todo=self.todo,
        )

    def _failed(self, happened: str, errors: list[str]) -> End:
        says_what_to_do = "same command" in happened
        return End(
            status="failed",
            code=1,
            happened=happened,
            kept=self._what_is_kept(),
            todo="" if says_what_to_do else self.todo,
            more={"errors": errors},
        )

    def _what_is_kept(self) -> str:
        found: list[str] = []

        def look() -> None:
            try:
                found.append(self.kept())
            except Exception as error:  # noqa: BLE001  # every storage raises its own
                found.append(f"unknown ({type(error).__name__}: {error})")

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(_KEPT_SECONDS)
        return found[0] if found else "unknown (storage does not answer)"

    def _leave_at_once(self) -> NoReturn:
        """End from another thread: what should have let go of the main one does not."""
        if self.signals.number is None:
            self.lost("the work was given up, and the cluster does not let go of it")
        end = self._of_signal()
        self.tell(end)
        os._exit(end.code)

    def _emit(self, values: Mapping[str, Any]) -> None:
        if self._as_json:
            sys.stdout.flush()
            os.write(self._out, (json.dumps(values, default=str) + "\n").encode())


@contextmanager
def reported_errors(as_json: bool, *, of_run: bool = False) -> Iterator[Ending]:
    """End the command with a line, its JSON object and its exit code, whatever happens in the block.

    Args:
        as_json: keep standard output for the object.
        of_run: whether it is a command that runs something, of which something may be kept.
    """
    import typer

    ending = Ending(as_json=as_json, of_run=of_run)
    try:
        with ending.signals.handled():
            try:
                yield ending
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the last stop
                end = ending.of(error)
                ending.tell(end)
                raise typer.Exit(end.code) from None
    finally:
        ending.close()


def end_of_signal(number: int, *, over: str = "", kept: str = "", todo: str = "") -> End:
    """Return the end that a signal is."""
    interrupted = number == signal.SIGINT
    return End(
        status="interrupted" if interrupted else "stopped",
        code=128 + (signal.SIGINT if interrupted else signal.SIGTERM),
        happened=f"{NAMES[number]}{over}",
        kept=kept,
        todo=todo,
    )


def tell_before_it_begins(arguments: Sequence[str]) -> None:
    """From now on a signal ends the command at once, with its line, until `reported_errors` takes over.

    Args:
        arguments: of the command line.
    """

    def tell(number: int) -> int:
        end = end_of_signal(number, kept="all as it was", todo=AGAIN)
        _print(str(end))
        if "--json" in arguments:
            os.write(1, (json.dumps(end.as_data()) + "\n").encode())
        return end.code

    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, AtOnce(tell))


def _is_rays(error: BaseException) -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and isinstance(error, ray.exceptions.RayError)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  # the last line, from any thread
