"""The closing table of `mgpp run`: what it says of sizes."""

import pytest
from rich.console import Console

from launch.cli.main import _next_steps, _table
from pipeline.runs.config import parse_config
from pipeline.store.artifacts import Artifact
from pipeline.tasks import make_task

FIGURES = {"num_zeros": 90, "num_prunable": 100, "model_zeros": 95, "num_parameters": 200}
CONFIG = {
    "name": "sizes",
    "model": {"path": "nowhere"},
    "task": {"type": "classification", "text": ["text"], "label": "label"},
    "data": {"source": "files", "train": "rows.csv"},
    "prune": {"sparsity": 0.9},
}


def printed(sizes, embeddings, compressed=None):
    export = Artifact(
        stage="export",
        key="0",
        url="runs/export-0/a-0",
        seconds=1.0,
        files={},
        metrics=FIGURES,
        params={"name": "sizes"},
        inputs={},
    )
    summary = {
        "metrics": {"pruned": {"accuracy": 0.9}},
        "bytes": sizes,
        "embedding_bytes": embeddings,
        "compressed_bytes": compressed or {},
        "sparsity": 0.9,
        "model_sparsity": 0.475,
        "left_out": {},
        "seconds": {},
        "cached": [],
    }
    task = make_task(parse_config(CONFIG).task)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(_table(summary, {"export": export}, task))
    return " ".join(capture.get().replace("│", " ").split())


@pytest.mark.parametrize("packed", [True, False])
def test_both_copies_have_their_size_and_the_share_of_embeddings(packed):
    sizes = {"dense model": 90_900_000, "pruned model": 90_900_000}
    embeddings = {"pruned model": 45_450_000}
    if packed:
        sizes["packed model"], embeddings["packed model"] = 50_500_000, 45_450_000
    text = printed(sizes, embeddings)
    assert "size on disk 90.9 MB 90.9 MB (50% embeddings)" in text
    assert ("packed 50.5 MB (90% embeddings)" in text) == packed


def test_onnx_files_have_their_sizes_plain_and_compressed():
    sizes = {"dense model": 90_900_000, "pruned model": 90_900_000}
    sizes |= {"ONNX": 91_000_000, "ONNX int8": 23_000_000}
    compressed = {"ONNX": 47_100_000, "ONNX int8": 12_300_000}
    text = printed(sizes, {"pruned model": 45_450_000}, compressed)
    assert "ONNX 91.0 MB (47.1 MB compressed) ONNX int8 23.0 MB (12.3 MB compressed)" in text


def test_a_packed_copy_is_named():
    settings = parse_config(CONFIG)
    task = make_task(settings.task)
    summary = {"model": "runs/x/model", "report": "runs/y/report.html"}
    assert "packed" not in _next_steps(summary, task, "run.yaml", settings)
    summary["packed"] = "runs/x/packed"
    assert "packed  runs/x/packed\n" in _next_steps(summary, task, "run.yaml", settings)
    summary["onnx"] = "runs/x/onnx"
    assert "packed\nonnx    runs/x/onnx\nreport" in _next_steps(summary, task, "run.yaml", settings)
