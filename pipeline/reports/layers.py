"""Sparsity by weight name, arranged by layer: the grids behind the report's heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import Any

OUTSIDE = "other"


@dataclass(frozen=True, kw_only=True)
class LayerMatrix:
    """Sparsity in [0, 1] by layer (row) and matrix within the layer (column); None: no such one."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


def split_layer(name: str) -> tuple[str, str]:
    """The layer of a weight, the first integer of its dotted name, and the name without it."""
    parts = name.removesuffix(".weight").split(".")
    layer = next((part for part in parts if part.isdecimal()), OUTSIDE)
    if layer != OUTSIDE:
        parts.remove(layer)
    return layer, ".".join(parts)


def without_common_prefix(names: Sequence[str]) -> list[str]:
    """Dotted names without the leading components that all share; the last one always stays."""
    parts = [name.split(".") for name in names]
    heads = zip(*(part[:-1] for part in parts), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, heads)))
    return [".".join(part[shared:]) for part in parts]


def layer_matrix(sparsity: Mapping[str, float]) -> LayerMatrix:
    """Arrange sparsity by weight name in layers, in order, and matrices, as they come.

    Weights outside the layers share a last row; with no layer at all, each weight is a row.
    """
    cells = {split_layer(name): value for name, value in sparsity.items()}
    if all(layer == OUTSIDE for layer, _ in cells):
        rows = without_common_prefix([name for _, name in cells])
        return LayerMatrix(rows=rows, columns=["weight"], values=[[v] for v in cells.values()])
    layers = {layer for layer, _ in cells}
    rows = sorted(layers, key=lambda layer: math.inf if layer == OUTSIDE else int(layer))
    inner = list(dict.fromkeys(name for layer, name in cells if layer != OUTSIDE))
    outer = [name for layer, name in cells if layer == OUTSIDE]
    values: list[list[float | None]] = [
        [*(cells.get((row, name)) for name in inner)]
        + [cells[row, name] if row == OUTSIDE else None for name in outer]
        for row in rows
    ]
    return LayerMatrix(rows=rows, columns=[*without_common_prefix(inner), *outer], values=values)


def layer_history(snapshots: Sequence[Mapping[str, Any]]) -> LayerMatrix:
    """Mean sparsity of the matrices of each layer (row), weighing alike, by snapshot (column)."""
    matrices = [layer_matrix(snapshot["sparsity"]) for snapshot in snapshots]
    means = [
        {row: _mean(values) for row, values in zip(matrix.rows, matrix.values, strict=True)}
        for matrix in matrices
    ]
    rows = matrices[-1].rows if matrices else []
    values = [[mean.get(row) for mean in means] for row in rows]
    columns = [str(snapshot["step"]) for snapshot in snapshots]
    return LayerMatrix(rows=rows, columns=columns, values=values)


def difference_to_mean(values: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Each value less the mean of its column."""
    means = [_mean(column) or 0.0 for column in zip(*values, strict=True)]
    return [
        [
            None if value is None or not math.isfinite(value) else round(value - mean, 6)
            for value, mean in zip(row, means, strict=True)
        ]
        for row in values
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are finite; None where there is none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(found) if found else None
