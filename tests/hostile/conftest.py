"""A good configuration to spoil."""

import pytest
import yaml


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_bert, words_csv):
    """A valid configuration, and a folder that may be copied."""
    folder = tmp_path_factory.mktemp("good")
    values = {
        "name": "tiny",
        "storage": str(folder / "storage"),
        "model": {"path": str(tiny_bert)},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 16},
        "data": {"source": "files", "train": str(words_csv)},
        "train": {"length": 20, "batch_size": 8},
        "prune": {"sparsity": 0.5, "start_after": 2, "finetune": 4, "interval": 2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
