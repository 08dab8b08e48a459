"""How fast a model's variants are: bars of each against dense float32, tables, sentences."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from pipeline.reports.figures import COLOURS, TEMPLATE
from pipeline.reports.page import Plot, render_page

_ORDER = ("dense", "threshold", "spike", "pruned")  # colours, of the variants in their order


@dataclass(frozen=True, kw_only=True)
class SpeedTable:
    """A table of text."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """All that is shown of a benchmark."""

    sizes: list[str]
    """Batch x length of each measurement."""
    ratios: dict[str, list[float]]
    """How many times as fast as dense fp32 each variant is, by its title, at each size."""
    texts: dict[str, list[str]]
    """Latency of the same, as text."""
    tables: list[SpeedTable]
    summary: list[str]
    """Sentences, the first over all sizes."""
    explanation: str
    """How it was measured."""

    def plot(self) -> Plot:
        """The figure with its caption."""
        caption = "Times as fast as dense fp32, by batch x length. At the bars: latency."
        figure = speed_figure(self.sizes, self.ratios, self.texts)
        return Plot(title="Speed on a CPU", caption=caption, figure=figure, wide=True)


def speed_figure(
    sizes: Sequence[str], ratios: Mapping[str, Sequence[float]], texts: Mapping[str, Sequence[str]]
) -> go.Figure:
    """Bars of each variant's speed over that of dense fp32, grouped by size; `texts`: at their ends."""
    fig = go.Figure(layout={"template": TEMPLATE})
    names = [html.escape(size) for size in sizes]
    for colour, (title, values) in zip(_ORDER, ratios.items(), strict=False):
        fig.add_bar(
            y=names,
            x=[round(value, 4) for value in values],
            orientation="h",
            name=html.escape(title),
            marker_color=COLOURS[colour],
            text=list(texts[title]),
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x:.2f} times, %{text}",
        )
    longest = max(max(values) for values in ratios.values())
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    fig.update_xaxes(title_text="times as fast as dense fp32", range=[0, 1.15 * longest])
    height = 120 + 24 * len(names) * len(ratios)
    fig.update_layout(barmode="group", bargap=0.25, hovermode="closest", showlegend=True)
    return fig.update_layout(legend_traceorder="normal", legend_y=1, height=height)


def render_speed(name: str, speed: Speed) -> str:
    """The HTML page of a benchmark, in one file."""
    return render_page("speed.html.jinja", name=name, speed=speed, plot=speed.plot())
