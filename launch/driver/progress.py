"""The progress of a run: live bars on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from launch.workers.status_actor import Posted
from pipeline.errors import RunStoppedError

_POLL_SECONDS = 0.5
_PLAIN_SECONDS = 10.0


class StageDisplay:
    """Shows the stages of a group while they run.

    Args:
        stages: their names, in order.
        console: where to show them; standard error.
        latest: returns what was posted so far.

    Attributes:
        seconds: wall seconds of each stage that ended.
    """

    def __init__(self, stages: list[str], console: Console, latest: Callable[[], Posted]) -> None:
        self.seconds: dict[str, float] = {}
        self._waiting = list(stages)
        self._console = console
        self._latest = latest
        self._notes_shown = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=10 if kind is None else 2)  # Ray may not answer any more
        if kind is None:
            while self._waiting:
                self._end_first("done")
        else:
            stopped = issubclass(kind, (KeyboardInterrupt, RunStoppedError))
            self._end_first("stopped" if stopped else "failed")

    def _end_first(self, outcome: str) -> None:
        now = time.monotonic()
        stage = self._waiting.pop(0)
        self.seconds[stage], self._since = now - self._since, now
        self._print(f"{stage:<9} {outcome} in {self.seconds[stage]:.1f} s")

    def _watch(self) -> None:
        view = _Bar(self._console) if self._console.is_terminal else _Lines(self._console)
        with view:
            view.begin(self._waiting[0])
            stopped = False
            while not stopped:
                stopped = self._stop.wait(_POLL_SECONDS)
                try:
                    records, notes = self._latest()  # once more after the end, for the last line
                except Exception:  # noqa: BLE001  # Ray is lost, which the work itself comes upon
                    return
                for note in notes[self._notes_shown :]:
                    self._print(f"{self._waiting[0]:<9} {note}")
                self._notes_shown = len(notes)
                while any(later in records for later in self._waiting[1:]):
                    view.show(records.get(self._waiting[0]), last=True)
                    self._end_first("done")
                    view.begin(self._waiting[0])
                view.show(records.get(self._waiting[0]), last=stopped)

    def _print(self, text: str) -> None:
        self._console.print(text)


class _Bar:
    """A live bar, for a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, transient=True)
        self._bar: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, stage: str) -> None:
        """Draw a stage's bar in place of the one before."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
        self._bar = self._bars.add_task(stage, total=None, text="starting")

    def show(self, record: dict[str, Any] | None, *, last: bool) -> None:
        """Move the bar to a record."""
        assert self._bar is not None
        if record is not None:
            done, total = _counted(record)
            self._bars.update(self._bar, completed=done, total=total, text=describe(record))


class _Lines:
    """Plain lines now and then, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._shown: dict[str, Any] | None = None
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""

    def begin(self, stage: str) -> None:
        """Say that a stage starts."""
        self._stage, self._shown, self._next = stage, None, time.monotonic()
        self._console.print(f"{stage:<9} starting")

    def show(self, record: dict[str, Any] | None, *, last: bool) -> None:
        """Print a new record when it is time to, or when it is the last."""
        if record is None or record == self._shown:
            return
        if last or time.monotonic() >= self._next:
            line = f"{self._stage:<9} {describe(record)}"
            self._console.print(line)
            self._shown, self._next = record, time.monotonic() + _PLAIN_SECONDS


def describe(record: dict[str, Any]) -> str:
    """Return one line for a record: step or rows, loss, mask, threshold, tokens/s, time left."""
    done, total = _counted(record)
    if record.get("event") == "write":
        return f"writing the model: round {done}/{total}"
    if record.get("event") == "bench":
        return f"measuring the exported model: {record['text']}, {done}/{total}"
    rows = "what" in record
    parts = [f"{record['what']}  {done:,}/{total:,} rows" if rows else f"step {done}/{total}"]
    if "model" in record:
        parts.append(f"{record['model']} model")
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "mask_sparsity" in record:
        parts.append(f"mask sparsity {record['mask_sparsity']:.2%}")
    if record.get("threshold") is not None:
        parts.append(f"threshold {record['threshold']:.2e}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "step_seconds" in record:
        parts.append(_left((total - done) * record["step_seconds"]))
    if "seconds_left" in record:
        parts.append(_left(record["seconds_left"]))
    return "  ".join(parts)


def _counted(record: dict[str, Any]) -> tuple[int, int]:
    """Return how many steps, or rows, are done and of how many."""
    if "what" in record:
        return record["done"], record["total"]
    return record["step"] + 1, record["num_steps"]


def _left(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"
