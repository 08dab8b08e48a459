"""The figures of the report: plain values in, a Plotly figure out, or None with nothing to draw.

Shares stay in [0, 1] here, and the axes' tick format makes them percent. The colours of text and
grid are left to the page, which knows whether it is light, dark or printed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go

from pipeline.reports.series import Points, Records, Spans, finite, smoothed, step_series, thinned

Grid = Sequence[Sequence[float | None]]

# Mid-tones, readable on white as well as on near-black.
COLOURS = {
    "dense": "#8a94a6",
    "pruned": "#3b76e1",
    "threshold": "#d1862b",
    "spike": "#17968a",
    "churn": "#c4527e",
    "warm-up": "rgba(138, 148, 166, 0.13)",
    "gradual pruning": "rgba(59, 118, 225, 0.08)",
    "fixed mask": "rgba(23, 150, 138, 0.11)",
}
SPARSITY_SCALE = [[0.0, "#eef3fb"], [0.5, "#a3c0f3"], [0.7, "#4a80e4"], [1.0, "#16316b"]]
DIFFERENCE_SCALE = [[0.0, "#b5651d"], [0.5, "#f1f3f6"], [1.0, "#2f66cf"]]
CLEAR = "rgba(0, 0, 0, 0)"
MAX_POINTS = 1200  # A curve has fewer pixels than this, and long runs must not bloat the page.

# Clear ticks keep the labels off the axis.
_TICKS = {"ticks": "outside", "ticklen": 6, "tickcolor": CLEAR, "tickformat": ",~g"}
_AXIS = {"showgrid": True, "zeroline": False, "title": {"standoff": 8}, **_TICKS}
_COLOUR_BAR = {"thickness": 10, "outlinewidth": 0}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "height": 300,
        "margin": {"l": 82, "r": 30, "t": 32, "b": 48},
        "hovermode": "x unified",
        "showlegend": False,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.09, "yanchor": "bottom"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "bargap": 0.45,
    }
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How to draw a key of the records by step: axis title, a key of COLOURS, kind of axis.

    `percent` is of a share in [0, 1]. A noisy curve is drawn raw (faint) and smoothed.
    """

    key: str
    y_title: str
    colour: str
    kind: Literal["linear", "log", "percent"] = "linear"
    noisy: bool = False


# Of the training records, by title.
STEP_CURVES = {
    "Sparsity of the last mask": Curve(
        key="mask_sparsity",
        y_title="share of prunable weights (%)",
        colour="pruned",
        kind="percent",
    ),
    "Pruning threshold": Curve(
        key="threshold", y_title="weight magnitude |w|", colour="threshold", kind="log"
    ),
    "Prior probability of the slab": Curve(
        key="slab_prob", y_title="probability", colour="spike", kind="log"
    ),
    "Learning rate": Curve(key="lr", y_title="learning rate", colour="pruned"),
    "Gradient norm": Curve(
        key="grad_norm", y_title="L2 norm of the gradient", colour="churn", kind="log", noisy=True
    ),
    "Throughput": Curve(
        key="tokens_per_second", y_title="tokens per second", colour="dense", noisy=True
    ),
}


def _add_line(fig: go.Figure, points: Points, **style: Any) -> None:
    """Add (step, value) points as a line, thinned."""
    drawn = thinned(points, MAX_POINTS)
    # A lone point draws no line.
    mode = "lines" if len(drawn) > 1 else "markers"
    fig.add_scatter(x=[x for x, _ in drawn], y=[y for _, y in drawn], mode=mode, **style)


def _add_curve(fig: go.Figure, points: Points, name: str, colour: str, *, noisy: bool) -> None:
    """Add a curve; a noisy one as a faint line of every value and a solid one of their average."""
    if noisy:
        style = {"line": {"color": colour, "width": 1}, "opacity": 0.25, "showlegend": False}
        _add_line(fig, points, name=f"{name}, raw", hoverinfo="skip", **style)
    line = {"color": colour, "width": 2.2}
    drawn = smoothed(points) if noisy else points
    _add_line(fig, drawn, name=name, line=line, hovertemplate="%{y:.4g}")


def _shade_phases(fig: go.Figure, spans: Spans) -> None:
    """Tint the phases behind the curves, and name those wide enough above the plot."""
    end = max((right for _, _, right in spans), default=0)
    for name, left, right in spans:
        fig.add_vrect(x0=left, x1=right, fillcolor=COLOURS[name], line_width=0, layer="below")
        if right - left > 0.12 * end:
            label = {"text": name, "x": left, "y": 1, "yref": "paper", "opacity": 0.65}
            place = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "font_size": 11}
            fig.add_annotation(**label, **place)


def _step_figure(spans: Spans, y_title: str, last_step: int, **y_axis: Any) -> go.Figure:
    """An empty figure over training steps, phases shaded."""
    fig = go.Figure(layout={"template": TEMPLATE})
    _shade_phases(fig, spans)
    end = max([last_step, *(right for _, _, right in spans)])
    x_title = "training step"
    fig.update_xaxes(title_text=x_title, range=[0, end], tickformat=",d", hoverformat=",d")
    fig.update_yaxes(title_text=y_title, **y_axis)
    return fig


def loss_figure(steps: Records, dense_steps: Records, spans: Spans) -> go.Figure | None:
    """Training loss (nats) by step of both runs, raw (faint) and smoothed."""
    runs = {"dense": step_series(dense_steps, "loss"), "pruned": step_series(steps, "loss")}
    runs = {name: points for name, points in runs.items() if points}
    if not runs:
        return None
    last_step = max(points[-1][0] for points in runs.values())
    fig = _step_figure(spans, "training loss (nats)", last_step)
    for name, points in runs.items():
        _add_curve(fig, points, name, COLOURS[name], noisy=True)
    return fig.update_layout(showlegend=len(runs) > 1, height=360)


def curve_figure(records: Records, curve: Curve, spans: Spans) -> go.Figure | None:
    """One quantity by step."""
    points = step_series(records, curve.key)
    y_axis: dict[str, Any] = {"rangemode": "tozero"}
    if curve.kind == "percent":
        y_axis["tickformat"] = ".0%"
    if curve.kind == "log":
        points = [(step, value) for step, value in points if value is not None and value > 0]
        values = [value for _, value in points if value is not None] or [1.0]
        # Within two decades 1, 2 and 5 are marked, beyond only the powers of ten.
        y_axis = {"type": "log", "dtick": "D2" if max(values) < 100 * min(values) else 1}
    if not points:
        return None
    fig = _step_figure(spans, curve.y_title, points[-1][0], **y_axis)
    name = curve.key.replace("_", " ")
    _add_curve(fig, points, name, COLOURS[curve.colour], noisy=curve.noisy)
    return fig.update_traces(hovertemplate="%{y:.2%}") if curve.kind == "percent" else fig


def spike_figure(prunings: Records, spans: Spans) -> go.Figure | None:
    """Share of the prunable weights below the spike threshold, beside the sparsity."""
    y_title = "share of prunable weights (%)"
    curve = Curve(key="spike_share", y_title=y_title, colour="spike", kind="percent")
    fig = curve_figure(prunings, curve, spans)
    if fig is None:
        return None
    fig.data[0].name = "in the spike"
    line = {"color": COLOURS["dense"], "width": 1.5, "dash": "dot"}
    sparsity = step_series(prunings, "sparsity")
    _add_line(fig, sparsity, name="sparsity", line=line, hovertemplate="%{y:.2%}")
    return fig.update_layout(showlegend=True)


def churn_figure(prunings: Records, spans: Spans) -> go.Figure | None:
    """Share of the pruned set that is newly pruned, by step."""
    # All of the first pruned set is new: that point would flatten all the others.
    later = prunings[1:] if prunings and prunings[0].get("churn") == 1 else prunings
    y_title = "share of the pruned set (%)"
    curve = Curve(key="churn", y_title=y_title, colour="churn", kind="percent")
    return curve_figure(later, curve, spans)


def displacement_figure(prunings: Records, spans: Spans) -> go.Figure | None:
    """How far pruned weights have moved from zero by the next pruning, beside where they come back."""
    series = {
        "half of them": ("moved_median", "pruned"),
        "99 in a hundred": ("moved_p99", "threshold"),
    }
    lines = {
        name: [(s, v) for s, v in step_series(prunings, key) if v is not None]
        for name, (key, _) in series.items()
    }
    if not any(lines.values()):
        return None
    last_step = max(points[-1][0] for points in lines.values() if points)
    fig = _step_figure(spans, "|w| / cut", last_step, rangemode="tozero")
    for name, points in lines.items():
        _add_curve(fig, points, name, COLOURS[series[name][1]], noisy=False)
    line = {"color": COLOURS["dense"], "width": 1.5, "dash": "dot"}
    _add_line(fig, [(0, 1.0), (last_step, 1.0)], name="comes back", line=line, hoverinfo="skip")
    return fig.update_layout(showlegend=True)


def _sparsity_colours(values: Grid) -> dict[str, Any]:
    """Colour scale over the values' own range: at one global threshold layers differ by little."""
    found = [value for row in values for value in row if value is not None]
    low, high = min(found), max(found)
    if high - low < 1e-3:  # A flat map is one middle colour, not noise stretched to both ends.
        low, high = low - 0.01, high + 0.01
    fmt = ".0%" if high - low > 0.05 else ".1%"
    bar = {**_COLOUR_BAR, "title": {"text": "sparsity", "side": "top"}, "tickformat": fmt}
    return {"zmin": low, "zmax": high, "colorscale": SPARSITY_SCALE, "colorbar": bar}


def _row_axis(fig: go.Figure, rows: Sequence[str]) -> None:
    """Layers from the top down, the figure as tall as they need."""
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    fig.update_yaxes(title_text="layer" if rows[0].isdigit() else "")
    fig.update_layout(height=min(1400, 120 + 26 * max(4, len(rows))), hovermode="closest")


def layer_figure(rows: Sequence[str], columns: Sequence[str], values: Grid) -> go.Figure | None:
    """Heat map of the sparsity of each matrix (column) of each layer (row) at one pruning."""
    values = [[finite(value) for value in row] for row in values]
    if not any(value is not None for row in values for value in row):
        return None
    hover = "layer %{y}<br>%{x}<br>sparsity %{z:.2%}<extra></extra>"
    style = {"xgap": 2, "ygap": 2, "hovertemplate": hover, **_sparsity_colours(values)}
    if len(rows) <= 32 and len(columns) <= 12:
        style["texttemplate"] = "%{z:.1%}"
    labels = {"x": [html.escape(text) for text in columns], "y": [html.escape(t) for t in rows]}
    fig = go.Figure(go.Heatmap(z=values, **labels, **style), layout={"template": TEMPLATE})
    fig.update_xaxes(type="category", side="top", showgrid=False, automargin=True)
    _row_axis(fig, rows)
    return fig.update_layout(margin={"b": 16})


def layer_history_figure(
    rows: Sequence[str], steps: Sequence[int], values: Grid, differences: Grid, spans: Spans
) -> go.Figure | None:
    """Heat map of the `differences` of layers (rows) in sparsity, by step of the pruning.

    Not of the `values`, as the schedule takes all layers through the same wide range together.
    """
    found = [abs(value) for row in differences for value in row if value is not None]
    if len(steps) < 2 or len(rows) < 2 or not found:
        return None
    limit = max(1e-3, *found)
    # One edge more than columns: a mask holds from its pruning to the next, the last to the end.
    end = max([steps[-1] + 1, *(right for _, _, right in spans)])
    fig = _step_figure(spans, "", end)
    hover = "layer %{y}<br>from step %{customdata[0]:,d}<br>sparsity %{customdata[1]:.2%}"
    details = [list(zip(steps, row, strict=True)) for row in values]
    bar = {**_COLOUR_BAR, "title": {"text": "difference", "side": "top"}, "tickformat": "+.1%"}
    style = {"zmin": -limit, "zmax": limit, "colorscale": DIFFERENCE_SCALE, "colorbar": bar}
    style |= {"customdata": details, "hovertemplate": hover + ", %{z:+.2%} to the mean"}
    labels = [html.escape(text) for text in rows]
    fig.add_heatmap(x=[*steps, end], y=labels, z=differences, ygap=1, name="", **style)
    _row_axis(fig, rows)
    return fig


def metric_figure(
    dense: Mapping[str, float], pruned: Mapping[str, float], labels: Mapping[str, tuple[str, str]]
) -> go.Figure | None:
    """Bars of each metric as percent of the dense model's; `labels`: dense and pruned, as text."""
    ratios = {
        key: round(pruned[key] / dense[key], 6)
        for key in dense
        # A ratio says nothing of a metric that is zero or negative.
        if key in pruned and (finite(dense[key]) or 0) > 0 and (finite(pruned[key]) or 0) > 0
    }
    if not ratios:
        return None
    fig = go.Figure(layout={"template": TEMPLATE})
    names = [html.escape(key) for key in ratios]
    for which, run, sizes in ((0, "dense", [1] * len(names)), (1, "pruned", [*ratios.values()])):
        text = [labels[key][which] for key in ratios]
        _add_bars(fig, names, sizes, text, name=run, marker_color=COLOURS[run])
    fig.update_layout(showlegend=True, legend_y=1, barmode="group", bargap=0.35)
    title = "percent of the dense model's value"
    fig.update_xaxes(title_text=title, tickformat=".0%", range=[0, 1.18 * max(1, *ratios.values())])
    return fig.update_layout(height=100 + 50 * len(names))


def _add_bars(fig: go.Figure, names: Sequence[str], sizes: Any, text: Any, **style: Any) -> None:
    """Add horizontal bars with their value written at the end, from the top down."""
    words = {"text": text, "textposition": "outside", "cliponaxis": False}
    fig.add_bar(y=names, x=sizes, orientation="h", hovertemplate="%{text}", **words, **style)
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    fig.update_layout(hovermode="closest")


def time_figure(seconds: Mapping[str, float], labels: Mapping[str, str]) -> go.Figure | None:
    """Bars of the wall time of each stage, in the order run; `labels`: the times as text."""
    times = {stage: value for stage, value in seconds.items() if finite(value) is not None}
    if not times:
        return None
    longest = max(times.values())
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if longest >= 3 * scale or scale == 1
    )
    fig = go.Figure(layout={"template": TEMPLATE})
    sizes = [round(value / scale, 5) for value in times.values()]
    text = [labels[stage] for stage in times]
    names = [html.escape(stage) for stage in times]
    _add_bars(fig, names, sizes, text, marker_color=COLOURS["pruned"])
    fig.update_xaxes(title_text=f"wall time ({unit})", range=[0, 1.18 * max(*sizes, 1e-3)])
    return fig.update_layout(height=80 + 36 * len(times), margin_t=12)
