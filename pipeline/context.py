"""What a stage's work is done with: what it reads, where it writes, which workers do it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.outputs import OutputFiles
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tracking.recorder import Progress
from pipeline.worker_group import WorkerGroup


def never() -> bool:
    """Return False: nobody asks this work to stop."""
    return False


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where and with whom a stage works. It holds values, never settings.

    Attributes:
        inputs: folders of the stages before it, by stage name.
        model_kwargs: what the data asks of the model (num_labels, ...).
        output: folder the main worker writes to.
        workers: all of them; for a stage that has none, this process alone.
        checkpoints: where its unfinished work is kept.
        progress: called with records for people to watch.
        files: what this worker itself writes to the output; None where all workers reach `output`.
        is_to_stop: whether this worker says that the work is to end, saved, after the step under way;
            all workers agree on what any of them says.
    """

    inputs: Mapping[str, Path]
    model_kwargs: dict[str, Any]
    output: Path
    workers: WorkerGroup
    checkpoints: CheckpointStore
    progress: Progress
    files: OutputFiles | None = None
    is_to_stop: Callable[[], bool] = never

    def rows(self) -> Mapping[str, Any]:
        """Return the tokenized rows by split: each a `datasets.Dataset`."""
        from datasets import load_from_disk

        splits: Mapping[str, Any] = load_from_disk(str(self.data / "dataset"))
        return splits

    @property
    def data(self) -> Path:
        """The data stage's folder: tokenized rows in `dataset`, the tokenizer in `tokenizer`."""
        return self.inputs["data"]
