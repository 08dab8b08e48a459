"""What a training run leaves behind of itself: JSONL, TensorBoard events, and progress for people."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.metric import defined

Progress = Callable[[dict[str, Any]], None]

METRICS_FILE = "metrics.jsonl"


class Recorder:
    """Writes records as they come; only the main worker has one.

    Args:
        folder: where `metrics.jsonl` and `tensorboard/` go; the latter if tensorboard is installed.
        progress: called with each step record, and with a note where tensorboard is missing.
        history: lines of the run that this one resumes, written again first.
    """

    def __init__(self, folder: Path, progress: Progress, history: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        self._file = self.path.open("w", encoding="utf-8")
        self._events = _event_writer(folder / "tensorboard", progress)
        self._progress = progress
        for line in history.splitlines():
            record = _read(line)
            self.write(record.pop("event"), record.pop("step"), record)

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Write one record: `event` is "step", "prune" or "layers"; what is not a number is null."""
        record = {
            "event": event,
            "step": step,
            **{k: defined(v) if isinstance(v, float) else v for k, v in values.items()},
        }
        self._file.write(json.dumps(record, default=_number, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items() if self._events else ():
            if isinstance(value, int | float) and math.isfinite(value):
                self._events.add_scalar(f"{event}/{name}", value, step)
        if event == "step":
            self._progress(record)

    def close(self) -> None:
        """Flush everything to disk."""
        self._file.close()
        if self._events:
            self._events.close()


def _event_writer(folder: Path, progress: Progress) -> Any:
    """Return a writer of TensorBoard's events; None, with a note, where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # heavy; only the main worker needs it
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorboard":
            raise
        text = f"tensorboard is not installed: the run's records are in {METRICS_FILE} alone"
        progress({"event": "note", "text": text})
        return None
    return SummaryWriter(str(folder))


def _number(value: Any) -> float | None:
    return defined(float(value))


def _read(line: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(line)
    if record["event"] == "step" and "sparsity" in record:  # as it was called at first
        record["mask_sparsity"] = record.pop("sparsity")
    return record


def read_records(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read `metrics.jsonl` back."""
    return parse_records(path.read_text(encoding="utf-8"))


def parse_records(text: str) -> dict[str, list[dict[str, Any]]]:
    """Return the records of `metrics.jsonl` by event, each step once (a resumed run repeats some)."""
    by_event: dict[str, dict[int, dict[str, Any]]] = {}
    for line in text.splitlines():
        record = _read(line)
        by_event.setdefault(record.pop("event"), {})[record["step"]] = record
    return {
        event: [records[step] for step in sorted(records)] for event, records in by_event.items()
    }
