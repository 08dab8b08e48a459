"""What a person sees of a run: live bars on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_POLL_SECONDS = 0.5
_PLAIN_SECONDS = 10.0


class _Board:
    """Holds the newest record of a stage, and a failure that trying again cannot mend."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] | None = None
        self._failure: tuple[str, Any] | None = None

    def post(self, record: dict[str, Any]) -> None:
        self._latest = record

    def fail(self, kind: str, detail: Any) -> None:
        self._failure = self._failure or (kind, detail)

    def failure(self) -> tuple[str, Any] | None:
        return self._failure

    def latest(self) -> dict[str, Any] | None:
        return self._latest


def make_board() -> Any:
    """Start the actor that workers post records to."""
    return ray.remote(num_cpus=0)(_Board).remote()


class StageDisplay:
    """Shows one stage while it runs.

    Args:
        stage: its name.
        console: where to show it; standard error.
        latest: returns the newest record, or None.
    """

    def __init__(
        self, stage: str, console: Console, latest: Callable[[], dict[str, Any] | None]
    ) -> None:
        self._stage = stage
        self._console = console
        self._latest = latest
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        seconds = time.monotonic() - self._started
        outcome = "done" if kind is None else "failed"
        self._console.print(f"{self._stage:<9} {outcome} in {seconds:.1f} s", highlight=False)

    def _watch(self) -> None:
        if self._console.is_terminal:
            self._draw_bar()
        else:
            self._print_lines()

    def _draw_bar(self) -> None:
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            bar = bars.add_task(self._stage, total=None, text="starting")
            while not self._stop.wait(_POLL_SECONDS):
                record = self._latest()
                if record is not None:
                    bars.update(
                        bar,
                        completed=record["step"] + 1,
                        total=record["num_steps"],
                        text=describe(record),
                    )

    def _print_lines(self) -> None:
        self._console.print(f"{self._stage:<9} starting", highlight=False)
        shown, next_line, stopped = None, time.monotonic(), False
        while not stopped:
            stopped = self._stop.wait(_POLL_SECONDS)
            record = self._latest()  # once more after the end, for the last line
            due = stopped or time.monotonic() >= next_line
            if record is not None and record != shown and due:
                self._console.print(
                    f"{self._stage:<9} {describe(record)}", highlight=False, soft_wrap=True
                )
                shown, next_line = record, time.monotonic() + _PLAIN_SECONDS


def describe(record: dict[str, Any]) -> str:
    """Return one line for a record: step, loss, sparsity, threshold, tokens/s, time left."""
    parts = [f"step {record['step'] + 1}/{record['num_steps']}"]
    if "model" in record:
        parts.append(f"{record['model']} model")
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "sparsity" in record:
        parts.append(f"sparsity {record['sparsity']:.2%}")
    if record.get("threshold") is not None:
        parts.append(f"threshold {record['threshold']:.2e}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "step_seconds" in record:
        left = (record["num_steps"] - record["step"] - 1) * record["step_seconds"]
        parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
    return "  ".join(parts)
