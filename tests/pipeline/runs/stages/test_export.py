"""The memory that an export asks for, and where its weights go."""

from types import SimpleNamespace

import pytest

from pipeline.runs.config import parse_config
from pipeline.runs.stages.export import EXPORT, _files
from pipeline.storage.outputs import OutputFiles
from pipeline.store.artifacts import Artifact

WEIGHTS, OTHER = 10_000_000, 7_000


def config_of(precision="fp32", **export):
    return parse_config(
        {
            "name": "export",
            "model": {"path": "nowhere"},
            "task": {"type": "classification", "text": ["text"], "label": "label"},
            "data": {"source": "files", "train": "rows.csv"},
            "prune": {"sparsity": 0.9},
            "zero": {"precision": precision},
            "export": export,
        }
    )


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_onnx_and_a_benchmark_take_several_copies_of_the_weights(precision, itemsize):
    pruned = Artifact(
        stage="prune",
        key="0",
        url="runs/prune-0",
        seconds=1.0,
        files={
            "model/model.safetensors": {"bytes": WEIGHTS},
            "model/config.json": {"bytes": OTHER},
        },
        metrics={"export_bytes": 1000},
        params={},
        inputs={},
    )

    def memory(formats, bench=False):
        config = config_of(precision, format=formats, bench=bench)
        return EXPORT.memory(config, {"prune": pruned})

    assert memory(["plain"]) == memory(["plain", "packed"]) == 1000
    in_float32 = WEIGHTS // itemsize * 4
    assert memory(["plain", "onnx"]) - 1000 >= 4 * in_float32
    # Dense in float32, in bfloat16 and in int8, and in float32 again before it is made sparse.
    assert memory(["plain"], bench=True) - 1000 >= 11 * WEIGHTS // itemsize
    assert memory(["plain", "onnx"], bench=True) >= memory(["plain"], bench=True)


@pytest.mark.parametrize(
    ("export", "straight"),
    [
        ({}, True),
        ({"format": ["plain", "packed"]}, True),
        ({"format": ["plain", "onnx"]}, False),  # torch reads the folder
        ({"bench": True}, False),
    ],
)
def test_weights_go_straight_to_storage_unless_the_folder_is_read(tmp_path, export, straight):
    files = OutputFiles("s3://bucket/export-0/a-0")
    context = SimpleNamespace(config=config_of(**export), output=tmp_path, files=files)
    assert _files(context).url == (files.url if straight else str(tmp_path))
