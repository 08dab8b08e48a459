"""The memory that an export asks for."""

import pytest

from pipeline.runs.config import parse_config
from pipeline.runs.stages.export import EXPORT
from pipeline.store.artifacts import Artifact

WEIGHTS, OTHER = 10_000_000, 7_000


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
        config = parse_config(
            {
                "name": "memory",
                "model": {"path": "nowhere"},
                "task": {"type": "classification", "text": ["text"], "label": "label"},
                "data": {"source": "files", "train": "rows.csv"},
                "prune": {"sparsity": 0.9},
                "zero": {"precision": precision},
                "export": {"format": formats, "bench": bench},
            }
        )
        return EXPORT.memory(config, {"prune": pruned})

    assert memory(["plain"]) == memory(["plain", "packed"]) == 1000
    in_float32 = WEIGHTS // itemsize * 4
    assert memory(["plain", "onnx"]) - 1000 >= 4 * in_float32
    # Dense in float32, in bfloat16 and in int8, and in float32 again before it is made sparse.
    assert memory(["plain"], bench=True) - 1000 >= 11 * WEIGHTS // itemsize
    assert memory(["plain", "onnx"], bench=True) >= memory(["plain"], bench=True)
