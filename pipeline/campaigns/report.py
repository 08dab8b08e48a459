"""What a campaign leaves: its cells and their summary as CSV, Parquet and Markdown, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import plotly.graph_objects as go
import pyarrow
from plotly.colors import qualitative
from pyarrow import csv, parquet

from pipeline.campaigns.grid import DENSE, CampaignCell, CampaignConfig
from pipeline.reports import figures
from pipeline.reports.page import Plot, render_page

CELLS, SUMMARY = "cells", "summary"
MARKDOWN_FILE, PAGE_FILE = "summary.md", "report.html"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What came of a cell.

    Attributes:
        cell: of the campaign.
        headline: name of its task's headline metric.
        higher_is_better: whether a larger one is better.
        metrics: of the pruned model, or of the dense one; empty if it failed.
        seconds: wall seconds of each stage when it ran, whichever cell ran it.
        num_workers: of its worker group.
        url: of its last artifact; empty if it failed.
        failure: why it failed; empty if it did not.
    """

    cell: CampaignCell
    headline: str
    higher_is_better: bool
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    num_workers: int
    url: str
    failure: str

    @property
    def own_seconds(self) -> float:
        """Wall seconds of what no other cell shares: not of data and dense fine-tune."""
        shared = {"data"} if self.cell.method == DENSE else {"data", "dense"}
        return sum(seconds for stage, seconds in self.seconds.items() if stage not in shared)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A method at a sparsity on a task and a model, over the seeds.

    Attributes:
        task, model, method, sparsity: as of the cells.
        headline: name of the metric.
        values: it, of each seed that is done.
        worker_seconds: wall seconds times workers of each of these.
        num_failed: how many seeds failed.
    """

    task: str
    model: str
    method: str
    sparsity: float
    headline: str
    values: tuple[float, ...]
    worker_seconds: tuple[float, ...]
    num_failed: int

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where none is done."""
        return mean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """Mean and spread, for people."""
        if self.mean is None:
            return "failed"
        digits = 2 if abs(self.mean) >= 10 else 4
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        missing = f" ({self.num_failed} failed)" if self.num_failed else ""
        return f"{self.mean:.{digits}f}{spread}{missing}"


def groups(results: Sequence[CellResult]) -> list[Group]:
    """Return the cells' summary over the seeds, in the order of the cells."""
    together: dict[tuple[str, str, str, float], list[CellResult]] = {}
    for result in results:
        cell = result.cell
        place = (cell.task, cell.model, cell.method, cell.sparsity)
        together.setdefault(place, []).append(result)
    return [
        Group(
            task=task,
            model=model,
            method=method,
            sparsity=sparsity,
            headline=of[0].headline,
            values=tuple(r.metrics[r.headline] for r in of if not r.failure),
            worker_seconds=tuple(r.own_seconds * r.num_workers for r in of if not r.failure),
            num_failed=sum(1 for r in of if r.failure),
        )
        for (task, model, method, sparsity), of in together.items()
    ]


def write_campaign(
    folder: Path, config: CampaignConfig, results: Sequence[CellResult]
) -> dict[str, Any]:
    """Write tables and page to `folder`, which is there.

    Returns:
        The summary, plain values.
    """
    summary = groups(results)
    cell_rows = [_cell_row(result) for result in results]
    summary_rows = [_summary_row(group) for group in summary]
    for name, rows in ((CELLS, cell_rows), (SUMMARY, summary_rows)):
        table = _table(rows)
        csv.write_csv(table, folder / f"{name}.csv")
        parquet.write_table(table, folder / f"{name}.parquet")
    (folder / MARKDOWN_FILE).write_text(markdown_tables(summary), encoding="utf-8")
    (folder / PAGE_FILE).write_text(render_campaign(config, results), encoding="utf-8")
    return {"rows": summary_rows, "num_failed": sum(1 for r in results if r.failure)}


def markdown_tables(summary: Sequence[Group]) -> str:
    """Return a table a task and model, methods by sparsities: mean and spread, as Markdown."""
    return "\n".join(
        "\n".join(
            [
                f"**{title}**: {headline}",
                "",
                "| | " + " | ".join(columns) + " |",
                "|---" * (len(columns) + 1) + "|",
                *("| " + " | ".join([method, *texts]) + " |" for method, texts in rows),
                "",
            ]
        )
        for title, headline, columns, rows in _tables(summary)
    )


def render_campaign(config: CampaignConfig, results: Sequence[CellResult]) -> str:
    """Return the campaign's page: metric against sparsity of every method, and what each cell cost."""
    summary = groups(results)
    plots = [
        Plot(
            title=title,
            caption="Means over the seeds; bars are their spread. Dashed: the dense model.",
            figure=_figure([g for g in summary if (g.task, g.model) == place]),
        )
        for place, title in _places(summary).items()
    ]
    costs = [
        (result.cell.title, f"{result.own_seconds:,.0f}", f"{result.num_workers}", result.url)
        for result in results
        if not result.failure
    ]
    return render_page(
        "campaign.html.jinja",
        package="pipeline.campaigns",
        name=config.name,
        num_cells=len(results),
        worker_hours=sum(sum(group.worker_seconds) for group in summary) / 3600,
        tables=_tables(summary),
        plots=plots,
        costs=costs,
        failures=[(r.cell.title, r.failure) for r in results if r.failure],
    )


def _places(summary: Sequence[Group]) -> dict[tuple[str, str], str]:
    return {(g.task, g.model): f"{g.task}, {g.model}" if g.model else g.task for g in summary}


def _tables(
    summary: Sequence[Group],
) -> list[tuple[str, str, list[str], list[tuple[str, list[str]]]]]:
    """Return title, metric, column names and rows (method, texts) of each task and model."""
    tables = []
    for place, title in _places(summary).items():
        mine = [g for g in summary if (g.task, g.model) == place]
        found = {(g.method, g.sparsity): g.text for g in mine}
        sparsities = sorted({g.sparsity for g in mine if g.method != DENSE})
        rows = []
        for method in dict.fromkeys(g.method for g in mine):
            at = [0.0] * len(sparsities) if method == DENSE else sparsities
            rows.append((method, [found.get((method, s), "") for s in at]))
        columns = [f"{100 * s:g}% zeros" for s in sparsities]
        tables.append((title, mine[0].headline, columns, rows))
    return tables


def _figure(mine: Sequence[Group]) -> go.Figure:
    """Draw the metric against sparsity, a line a method."""
    figure = go.Figure(layout={"template": figures.TEMPLATE, "height": 360, "showlegend": True})
    sparsities = sorted({g.sparsity for g in mine if g.method != DENSE})
    methods = dict.fromkeys(g.method for g in mine if g.method != DENSE)
    for colour, method in zip(_cycled(len(methods)), methods, strict=True):
        line = sorted(
            (g for g in mine if g.method == method and g.values), key=lambda g: g.sparsity
        )
        figure.add_scatter(
            x=[g.sparsity for g in line],
            y=[g.mean for g in line],
            error_y={"array": [g.spread or 0.0 for g in line], "thickness": 1},
            name=method,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            hovertemplate="%{y:.4g}",
        )
    for dense in (g for g in mine if g.method == DENSE and g.values):
        figure.add_scatter(
            x=[min(sparsities), max(sparsities)],
            y=[dense.mean] * 2,
            name=DENSE,
            mode="lines",
            line={"color": figures.COLOURS["dense"], "dash": "dash"},
            hovertemplate="%{y:.4g}",
        )
    figure.update_xaxes(title_text="zeros among the prunable weights", tickformat=".0%")
    figure.update_xaxes(tickvals=sparsities)
    figure.update_yaxes(title_text=mine[0].headline)
    return figure


def _cycled(count: int) -> list[str]:
    colours = qualitative.Safe
    return [colours[i % len(colours)] for i in range(count)]


def _cell_row(result: CellResult) -> dict[str, Any]:
    cell = result.cell
    return {
        "task": cell.task,
        "model": cell.model,
        "method": cell.method,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "state": "failed" if result.failure else "done",
        "failure": result.failure,
        "url": result.url,
        "num_workers": result.num_workers,
        **{f"seconds.{stage}": seconds for stage, seconds in result.seconds.items()},
        **{f"metric.{name}": float(value) for name, value in result.metrics.items()},
    }


def _summary_row(group: Group) -> dict[str, Any]:
    return {
        "task": group.task,
        "model": group.model,
        "method": group.method,
        "sparsity": group.sparsity,
        "metric": group.headline,
        "mean": group.mean,
        "spread": group.spread,
        "num_seeds": len(group.values),
        "num_failed": group.num_failed,
        "worker_seconds": mean(group.worker_seconds) if group.worker_seconds else None,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """Return rows as a table with the columns of all of them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pyarrow.table({name: [row.get(name) for row in rows] for name in names})
