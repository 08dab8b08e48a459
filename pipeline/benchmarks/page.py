"""What a benchmark found as a page, and as a section of a run's report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.benchmarks.summary import (
    explanation,
    milliseconds,
    notes,
    running,
    size_table,
    size_text,
    variant_table,
)
from pipeline.benchmarks.variants import VARIANTS
from pipeline.reports.speed import Speed, SpeedTable, render_speed


def speed_of(found: Mapping[str, Any]) -> Speed:
    """Return what a page shows of a benchmark."""
    # In their order, which colours follow: records sort their keys.
    ordered = {name: found["variants"][name] for name in VARIANTS if name in found["variants"]}
    found = {**found, "variants": ordered}
    tables = {
        "Latency and throughput": size_table(found),
        "What each variant takes": variant_table(found),
    }
    sizes, titles = found["sizes"], running(found)
    return Speed(
        sizes=[size_text(size) for size in sizes],
        ratios={
            title: [size["times_as_fast"][name] for size in sizes] for name, title in titles.items()
        },
        texts={
            title: [milliseconds(size["seconds"][name]) for size in sizes]
            for name, title in titles.items()
        },
        tables=[
            SpeedTable(title=title, head=head, rows=rows) for title, (head, rows) in tables.items()
        ],
        summary=[*found["summary"], *notes(found)],
        explanation=explanation(found),
    )


def write_page(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """Write a page of its own, in one file.

    Args:
        path: of the file.
        name: of the model.
        found: of `measure`.
    """
    path.write_text(render_speed(name, speed_of(found)), encoding="utf-8")
