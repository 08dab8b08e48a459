"""A valid configuration of a run on the tiny BERT, for tests to use or to spoil."""

from pathlib import Path
from typing import Any

import yaml


def write_run(folder: Path, model: Path, rows: Path, **more: Any) -> Path:
    """Write `run.yaml` to a folder, which has its storage too; return the file.

    Args:
        folder: of the file.
        model: folder of a classifier.
        rows: a CSV with the columns `text` and `label`.
        more: further sections.
    """
    values = {
        "name": "tiny",
        "storage": str(folder / "storage"),
        "model": {"path": str(model)},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 16},
        "data": {"source": "files", "train": str(rows)},
        "train": {"length": 20, "batch_size": 8},
        "prune": {"sparsity": 0.5, "start_after": 2, "finetune": 4, "interval": 2},
        **more,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
