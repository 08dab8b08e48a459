"""A run's records as series over training steps: gaps, smoothing, thinning, phases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[int, float | None]]
Spans = Sequence[tuple[str, int, int]]


def finite(value: Any) -> float | None:
    """`value` to six significant digits, or None where it is absent, NaN or infinite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most about `most` of `items`, evenly spaced, the last always among them."""
    stride = math.ceil(len(items) / most) or 1
    # Counted from the end, so that the final state of a run is what is kept.
    return list(items[::-1][::stride][::-1])


def step_series(records: Records, key: str) -> list[tuple[int, float | None]]:
    """(step, value) of the records that have `key`; a value that is not finite is None, a gap."""
    points = [(r["step"], finite(r[key])) for r in records if r.get(key) is not None]
    return points if any(value is not None for _, value in points) else []


def smoothed(points: Points) -> list[tuple[int, float | None]]:
    """Exponential moving average of (step, value), bias-corrected, over a fortieth of the run."""
    keep = 1 - 2 / (max(1, len(points) // 40) + 1)
    total = weight = 0.0
    out: list[tuple[int, float | None]] = []
    for step, value in points:
        if value is None:
            out.append((step, None))
            continue
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append((step, finite(total / weight)))
    return out


def phase_spans(phases: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """(name, first step, end step) of the phases that are not empty; [] without their edges."""
    if not {"prune_start", "prune_end", "num_steps"} <= phases.keys():
        return []
    # Before 0 where the mask is fixed from the first step on.
    start, end = (max(phases[edge], 0) for edge in ("prune_start", "prune_end"))
    edges = [0, start, end, phases["num_steps"]]
    names = ["warm-up", "gradual pruning", "fixed mask"]
    spans = zip(names, edges, edges[1:], strict=False)
    return [(name, left, right) for name, left, right in spans if right > left]
