"""A run's records as series: gaps, smoothing, thinning, phases."""

from __future__ import annotations

import math

import pytest

from pipeline.reports.series import phase_spans, smoothed, step_series, thinned


def test_smoothed_matches_the_weighted_mean() -> None:
    points = [(step, math.sin(step * step)) for step in range(120)]
    keep = 0.5  # a span of three: a fortieth of 120
    for last in (0, 1, 57, 119):
        weights = [keep ** (last - i) for i in range(last + 1)]
        values = [value for _, value in points[: last + 1]]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert smoothed(points)[last][1] == pytest.approx(mean, rel=1e-5)


def test_thinned_keeps_the_last() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned(range(11), 4)[-1] == 10
    assert thinned([], 4) == []


def test_step_series_drops_the_absent_and_gaps_the_rest() -> None:
    records = [
        {"step": 0},
        {"step": 1, "v": None},
        {"step": 2, "v": 1.0},
        {"step": 3, "v": math.nan},
    ]
    assert step_series(records, "v") == [(2, 1.0), (3, None)]
    assert step_series(records[3:], "v") == []


def test_phase_spans_leave_out_empty_phases() -> None:
    assert phase_spans({"prune_start": 0, "prune_end": 5, "num_steps": 5}) == [
        ("gradual pruning", 0, 5)
    ]
    assert phase_spans({"num_steps": 5}) == []
