"""What a campaign leaves: its tables, and one self-contained page."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from pipeline.campaigns.config import DENSE, CampaignConfig
from pipeline.campaigns.curves import curve_figure, curve_places
from pipeline.campaigns.selection import NO_CHOICE, Choice, was_chosen
from pipeline.campaigns.summary import (
    Group,
    Outcome,
    curves_of,
    groups,
    place_title,
    tables,
    write_summary,
)
from pipeline.reports import figures
from pipeline.reports.page import Plot, render_page

PAGE_FILE = "report.html"


def write_campaign(
    folder: Path,
    config: CampaignConfig,
    outcomes: Sequence[Outcome],
    choice: Choice = NO_CHOICE,
) -> dict[str, Any]:
    """Write tables and page to `folder`, which is there.

    Returns:
        The summary, plain values.
    """
    found = write_summary(folder, config, outcomes, choice)
    page = render_campaign(config, outcomes, choice)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    return found


def render_campaign(
    config: CampaignConfig, outcomes: Sequence[Outcome], choice: Choice = NO_CHOICE
) -> str:
    """Return the campaign's page."""
    summary, curves = groups(config, outcomes), curves_of(outcomes)
    shown = tables(summary)
    places = dict.fromkeys((g.place.task, g.place.model) for g in summary)
    plots = [
        Plot(
            title=f"{table.title} against sparsity",
            caption="Lines are means over the seeds, points the seeds. Dashed: the dense model.",
            figure=metric_figure([g for g in summary if g.place[:2] == place]),
        )
        for table, place in zip(shown, places, strict=True)
    ]
    losses = [
        Plot(
            title=f"{place_title(task, model) or config.name}: training loss",
            caption="A moving average over a fortieth of the run; below, the share of zeros.",
            figure=curve_figure(curves, task, model),
            wide=True,
        )
        for task, model in curve_places(curves)
    ]
    done = [outcome for outcome in outcomes if not outcome.failure]
    return render_page(
        "campaign.html.jinja",
        "pipeline.campaigns",
        name=config.name,
        num_runs=len(outcomes),
        worker_hours=sum(o.own_seconds * o.num_workers for o in done) / 3600,
        tables=list(zip(shown, plots, strict=True)),
        losses=losses,
        candidates=_candidates(config, outcomes, choice),
        costs=[(o.run.title, f"{o.own_seconds:,.1f}", o.num_workers, o.url) for o in done],
        failures=[(o.run.title, o.failure) for o in outcomes if o.failure],
    )


def _candidates(
    config: CampaignConfig, outcomes: Sequence[Outcome], choice: Choice
) -> list[tuple[str, str, str, bool]]:
    """Return title, settings, metric and whether it was chosen of each run of the selection."""
    metrics = {o.run.place.task: o.metric for o in outcomes}
    return [
        (
            run.title,
            json.dumps(config.methods[run.place.method].candidates[run.candidate]),
            metrics[run.place.task].text(score),
            was_chosen(config, run, choice.chosen),
        )
        for run, score in choice.scores.items()
    ]


def metric_figure(mine: Sequence[Group]) -> go.Figure:
    """Draw a metric against sparsity: of each method the means as a line, the seeds as points.

    Methods that are far worse than the rest are named below the figure, not drawn, for the rest would
    be one line.
    """
    metric = mine[0].metric
    figure = go.Figure(layout={"template": figures.TEMPLATE, "height": 360, "showlegend": True})
    sparsities = sorted({g.place.sparsity for g in mine if g.place.is_pruned})
    methods = dict.fromkeys(g.place.method for g in mine if g.place.is_pruned)
    for method, colour in zip(methods, itertools.cycle(qualitative.Safe), strict=False):
        line = sorted(
            (g for g in mine if g.place.method == method and g.values),
            key=lambda g: g.place.sparsity,
        )
        points = [(g.place.sparsity, v * metric.scale) for g in line for v in g.values]
        named = {"name": html.escape(method), "legendgroup": method, "marker_color": colour}
        figure.add_scatter(
            x=[g.place.sparsity for g in line],
            y=[(g.mean or 0.0) * metric.scale for g in line],
            mode="lines+markers",
            line={"color": colour, "width": 2},
            hovertemplate="%{y:.4g}",
            **named,
        )
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="markers",
            opacity=0.45,
            showlegend=False,
            hoverinfo="skip",
            **named,
        )
    for dense in (g for g in mine if not g.place.is_pruned and g.mean is not None):
        figure.add_scatter(
            x=[min(sparsities), max(sparsities)],
            y=[(dense.mean or 0.0) * metric.scale] * 2,
            name=DENSE,
            mode="lines",
            line={"color": figures.COLOURS["dense"], "dash": "dash"},
            hovertemplate="%{y:.4g}",
        )
    figure.update_xaxes(title_text="zeros among the prunable weights", tickformat=".0%")
    figure.update_xaxes(tickvals=sparsities)
    figure.update_yaxes(title_text=html.escape(metric.title))
    return _without_outliers(figure, mine)


def _without_outliers(figure: go.Figure, mine: Sequence[Group]) -> go.Figure:
    """Let the vertical axis span what is not an outlier, and name what is."""
    metric = mine[0].metric
    far = outliers(mine)
    if not far:
        return figure
    values = [v for g in mine if g not in far for v in g.values]
    near = [v * metric.scale for v in values if isfinite(v)]
    margin = 0.1 * (max(near) - min(near))
    figure.update_yaxes(range=[min(near) - margin, max(near) + margin])
    named = ", ".join(f"{g.place.title} {metric.text(g.mean)}" for g in far)
    figure.update_layout(margin_b=84)
    return figure.add_annotation(
        text=html.escape(f"not drawn: {named}"),
        showarrow=False,
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-72,
        xanchor="left",
    )


def outliers(mine: Sequence[Group]) -> list[Group]:
    """Return what is so much worse than the rest that the rest would be one line beside it.

    From the worst up to the first gap between means that is more than three times the range above it.
    """
    sign = 1 if mine[0].metric.higher_is_better else -1
    known = [(sign * g.mean, g) for g in mine if g.mean is not None and isfinite(g.mean)]
    ordered = sorted(known, key=lambda pair: pair[0])
    means = [mean for mean, _ in ordered]
    for i, (lower, upper) in enumerate(itertools.pairwise(means)):
        if upper - lower > 3 * (means[-1] - upper) > 0:
            return [g for _, g in ordered[: i + 1]]
    return []
