"""Weight names arranged by layer, for the families of models that are pruned."""

from __future__ import annotations

import math

import pytest

from pipeline.reports.layers import (
    difference_to_mean,
    layer_history,
    layer_matrix,
    without_common_prefix,
)

BERT_MATRICES = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


@pytest.mark.parametrize(
    ("pattern", "matrices"),
    [
        ("bert.encoder.layer.{}.{}.weight", BERT_MATRICES),
        ("transformer.h.{}.{}.weight", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("model.layers.{}.{}.weight", ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]),
        ("model.decoder.layers.{}.self_attn.{}.weight", ["q_proj", "k_proj"]),
    ],
)
def test_layer_matrix_of_model_families(pattern: str, matrices: list[str]) -> None:
    # Twelve layers, last first: rows are in order of number, not of text or arrival.
    sparsity = {
        pattern.format(layer, matrix): layer + column / 10
        for layer in reversed(range(12))
        for column, matrix in enumerate(matrices)
    }
    matrix = layer_matrix(sparsity)
    assert matrix.rows == [str(layer) for layer in range(12)]
    assert matrix.columns == matrices
    assert matrix.values == [
        [layer + column / 10 for column in range(len(matrices))] for layer in range(12)
    ]


def test_layer_matrix_keeps_encoder_and_decoder_apart() -> None:
    matrix = layer_matrix({"model.encoder.layers.0.fc1": 0.1, "model.decoder.layers.0.fc1": 0.2})
    assert matrix.columns == ["encoder.layers.fc1", "decoder.layers.fc1"]
    assert matrix.values == [[0.1, 0.2]]


def test_layer_matrix_outside_the_layers() -> None:
    mixed = layer_matrix({"model.layers.0.fc.weight": 0.1, "lm_head.weight": 0.2})
    assert (mixed.rows, mixed.columns) == (["0", "other"], ["fc", "lm_head"])
    assert mixed.values == [[0.1, None], [None, 0.2]]
    flat = layer_matrix({"net.first.weight": 0.1, "net.second.weight": 0.2})
    assert (flat.rows, flat.columns) == (["first", "second"], ["weight"])
    assert flat.values == [[0.1], [0.2]]


def test_layer_history_is_the_mean_by_layer() -> None:
    shots = [
        {"step": 10, "sparsity": {"layer.0.a": 0.2, "layer.0.b": 0.4, "layer.1.a": 0.5}},
        {"step": 20, "sparsity": {"layer.0.a": 0.6, "layer.0.b": math.nan, "layer.1.a": 0.7}},
    ]
    history = layer_history(shots)
    assert (history.rows, history.columns) == (["0", "1"], ["10", "20"])
    assert history.values == [[pytest.approx(0.3), 0.6], [0.5, 0.7]]


def test_difference_to_mean_is_by_column() -> None:
    values = [[0.2, 0.5, None], [0.4, math.nan, None]]
    assert difference_to_mean(values) == [[-0.1, 0.0, None], [0.1, None, None]]


def test_common_prefix_leaves_the_last_part() -> None:
    assert without_common_prefix(["a.b.c"]) == ["c"]
    assert without_common_prefix(["a.b", "a.b.c"]) == ["b", "b.c"]
    assert without_common_prefix([]) == []
