"""What a comparison leaves: its table as JSON, CSV and Markdown, a plot, and how the training went."""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.campaigns.curves import Curves, markdown_losses, plot_curves, write_points
from pipeline.campaigns.selection import DENSE, Cell, ComparisonConfig, TableRow

JSON_FILE, CSV_FILE, MARKDOWN_FILE, PLOT_FILE = (
    f"comparison.{suffix}" for suffix in ("json", "csv", "md", "png")
)
POINTS_FILE, CURVES_FILE = "curves.csv", "curves.png"


def write_comparison(
    folder: Path,
    config: ComparisonConfig,
    rows: Sequence[TableRow],
    selection: Mapping[Cell, float],
    curves: Curves,
    *,
    metric: str,
) -> dict[str, Any]:
    """Write tables and plots to `folder`.

    Args:
        folder: is there.
        config: the comparison.
        rows: of the table.
        selection: the metric of each selection cell.
        curves: the training of each pruned cell of the table.
        metric: name of the cells' metric.

    Returns:
        What the JSON file holds.
    """
    found = {
        "metric": metric,
        "rows": [
            {
                "method": row.method,
                "sparsity": row.sparsity,
                "mean": row.mean,
                "spread": row.spread,
                "values": list(row.values),
                "settings": row.settings,
            }
            for row in rows
        ],
        "selection": [
            {
                "method": cell.method,
                "sparsity": cell.sparsity,
                "seed": cell.seed,
                "settings": config.methods[cell.method].candidates[cell.candidate],
                "value": score,
            }
            for cell, score in selection.items()
        ],
    }
    (folder / JSON_FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")
    with (folder / CSV_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "sparsity", "seed", metric])
        for row in rows:
            for seed, value in zip(config.seeds, row.values, strict=True):
                writer.writerow([row.method, row.sparsity, seed, value])
    tables = [markdown_table(config, rows)]
    _plot(folder / PLOT_FILE, config, rows, metric)
    if curves:  # none where all methods prune in one shot
        tables.append(markdown_losses(curves))
        write_points(folder / POINTS_FILE, curves)
        plot_curves(folder / CURVES_FILE, config.name, curves)
    (folder / MARKDOWN_FILE).write_text("\n".join(tables), encoding="utf-8")
    return found


def markdown_table(config: ComparisonConfig, rows: Sequence[TableRow]) -> str:
    """Return methods by sparsities: mean and spread over the seeds in percent, as Markdown."""
    cells = {(row.method, row.sparsity): row for row in rows}
    lines = [
        "| | " + " | ".join(f"{sparsity:.0%} zeros" for sparsity in config.sparsities) + " |",
        "|---" * (len(config.sparsities) + 1) + "|",
    ]
    dense = cells[DENSE, 0.0]
    lines.append(f"| {DENSE} | " + " | ".join([_figure(dense)] * len(config.sparsities)) + " |")
    for method in config.methods:
        figures = (_figure(cells[method, sparsity]) for sparsity in config.sparsities)
        lines.append(f"| {method} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def _figure(row: TableRow) -> str:
    return f"{100 * row.mean:.2f} ± {100 * row.spread:.2f}"


def _plot(path: Path, config: ComparisonConfig, rows: Sequence[TableRow], metric: str) -> None:
    """Draw each seed as a point and each method's mean as a line over the sparsities."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{sparsity:.0%}" for sparsity in config.sparsities]
    width = 0.6 / len(config.methods)
    for i, method in enumerate(config.methods):
        mine = [row for row in rows if row.method == method]
        places = [j + (i + 0.5) * width - 0.3 for j in range(len(mine))]
        (line,) = axes.plot(places, [row.mean for row in mine], "_", markersize=18, label=method)
        for place, row in zip(places, mine, strict=True):
            axes.plot([place] * len(row.values), row.values, "o", alpha=0.5, color=line.get_color())
    dense = next(row for row in rows if row.method == DENSE)
    axes.axhline(dense.mean, color="grey", linestyle="--", label=DENSE)
    floor = _floor([row.mean for row in rows])
    below = [
        f"{row.method} {row.mean:.3f} at {row.sparsity:.0%}" for row in rows if row.mean < floor
    ]
    if below:
        shown = [value for row in rows if row.mean >= floor for value in row.values]
        margin = 0.1 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.annotate("below: " + ", ".join(below), (0.01, 0.02), xycoords="axes fraction")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("zeros among the prunable weights")
    axes.set_ylabel(metric)
    axes.set_title(f"{config.name}: {len(config.seeds)} seeds, bars are their means")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=150)


def _floor(means: Sequence[float]) -> float:
    """Return the least mean to draw: without what is so far below that the rest would be one line."""
    ordered = sorted(means)
    for lower, upper in itertools.pairwise(ordered):
        if upper - lower > 3 * (ordered[-1] - upper) > 0:
            return upper
    return ordered[0]
