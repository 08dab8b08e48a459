"""The training loss of a campaign's runs while their sparsity rises: points, table, figure."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from pipeline.campaigns.grid import CampaignRun
from pipeline.reports import figures
from pipeline.reports.series import Records, smoothed, thinned

# Of the final sparsity; where the training loss is read.
LEVELS = (0.5, 0.75, 0.9, 1.0)
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The training of one run, a value for each record.

    Attributes:
        steps: of the optimizer, rising.
        losses: the task's loss without what a teacher adds, averaged since the record before.
        sparsities: share of the prunable weights that the last mask prunes.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    sparsities: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses averaged over a fortieth of the run."""
        points = smoothed(list(zip(self.steps, self.losses, strict=True)))
        return tuple(loss for _, loss in points if loss is not None)

    def losses_at_levels(self) -> tuple[float, ...]:
        """Return the smoothed loss where the sparsity first reaches each of LEVELS, and at the end."""
        losses, final = self.smoothed, self.sparsities[-1]
        places = [
            next(i for i, sparsity in enumerate(self.sparsities) if sparsity >= level * final)
            for level in LEVELS
        ]
        return tuple(losses[i] for i in (*places, -1))


Curves = Mapping[CampaignRun, LossCurve]


def loss_curve(steps: Records) -> LossCurve:
    """Return a run's curve from its training records, all of which have loss and mask_sparsity."""
    return LossCurve(
        steps=tuple(record["step"] for record in steps),
        losses=tuple(record.get("task_loss", record["loss"]) for record in steps),
        sparsities=tuple(record["mask_sparsity"] for record in steps),
    )


def curve_points(curves: Curves) -> Iterator[dict[str, Any]]:
    """Yield every point of every curve as the row of a table."""
    for run, curve in curves.items():
        named = {
            "task": run.place.task,
            "model": run.place.model,
            "method": run.place.method,
            "final_sparsity": run.place.sparsity,
            "seed": run.seed,
        }
        for step, loss, sparsity in zip(curve.steps, curve.losses, curve.sparsities, strict=True):
            yield {**named, "step": step, "loss": loss, "sparsity": sparsity}


def curve_places(curves: Curves) -> list[tuple[str, str]]:
    """Return the tasks and models that have curves."""
    return list(dict.fromkeys((run.place.task, run.place.model) for run in curves))


def loss_tables(
    curves: Curves, task: str, model: str
) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """Return a title, columns and rows (method, losses) for each sparsity of a task and model.

    A loss is the mean over the seeds where the sparsity first reaches a share of the final one.
    """
    tables = []
    for sparsity, by_method in _arranged(curves, task, model).items():
        columns = [*(f"{100 * level * sparsity:.3g}% zeros" for level in LEVELS), "end"]
        rows = []
        for method, mine in by_method.items():
            means = map(mean, zip(*(curve.losses_at_levels() for curve in mine), strict=True))
            rows.append((method, [f"{loss:.3f}" for loss in means]))
        tables.append((f"Training loss on the way to {100 * sparsity:g}%", columns, rows))
    return tables


def curve_figure(curves: Curves, task: str, model: str) -> go.Figure:
    """Draw the smoothed loss of each method over its training, a column a sparsity, zeros below."""
    arranged = _arranged(curves, task, model)
    figure = make_subplots(
        rows=2,
        cols=len(arranged),
        shared_xaxes=True,
        vertical_spacing=0.06,
        row_heights=[0.75, 0.25],
        column_titles=[f"on the way to {100 * sparsity:g}%" for sparsity in arranged],
    )
    figure.update_layout(template=figures.TEMPLATE, height=520, showlegend=True, legend_y=1.08)
    methods = dict.fromkeys(method for by_method in arranged.values() for method in by_method)
    looks = dict(
        zip(methods, itertools.cycle(itertools.product(_DASHES, qualitative.Safe)), strict=False)
    )
    named = set()
    for column, by_method in enumerate(arranged.values(), start=1):
        for method, mine in by_method.items():
            dash, colour = looks[method]
            for curve in mine:
                style: dict[str, Any] = {
                    "name": html.escape(method),
                    "legendgroup": method,
                    "mode": "lines",
                    "line": {"color": colour, "dash": dash, "width": 1.4},
                    "hovertemplate": "%{y:.4g}",
                }
                shown = method not in named
                named.add(method)
                for row, values in ((1, curve.smoothed), (2, curve.sparsities)):
                    points = thinned(
                        [
                            ((step + 1) / (curve.steps[-1] + 1), value)
                            for step, value in zip(curve.steps, values, strict=True)
                        ],
                        figures.MAX_POINTS,
                    )
                    figure.add_scatter(
                        x=[x for x, _ in points],
                        y=[y for _, y in points],
                        showlegend=shown and row == 1,
                        row=row,
                        col=column,
                        **style,
                    )
    figure.update_xaxes(tickformat=".0%")
    figure.update_xaxes(title_text="share of the steps", row=2)
    figure.update_yaxes(type="log", row=1)
    figure.update_yaxes(tickformat=".0%", row=2)
    figure.update_yaxes(title_text="training loss, smoothed", row=1, col=1)
    return figure.update_yaxes(title_text="sparsity of the last mask", row=2, col=1)


def _arranged(curves: Curves, task: str, model: str) -> dict[float, dict[str, Sequence[LossCurve]]]:
    """Return the curves of a task and model by sparsity and method, a curve a seed."""
    arranged: dict[float, dict[str, list[LossCurve]]] = {}
    for run, curve in curves.items():
        if (run.place.task, run.place.model) == (task, model):
            by_method = arranged.setdefault(run.place.sparsity, {})
            by_method.setdefault(run.place.method, []).append(curve)
    return arranged  # type: ignore[return-value]
