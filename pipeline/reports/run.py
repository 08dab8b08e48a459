"""One run as one self-contained HTML page: headline figures, curves, layers, time, config."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from mgpp import METHODS, ONE_SHOT
from pipeline.metric import ABSENT, Metric
from pipeline.reports import figures
from pipeline.reports.layers import difference_to_mean, layer_history, layer_matrix
from pipeline.reports.page import Plot, render_page
from pipeline.reports.series import Spans, finite, phase_spans, thinned
from pipeline.reports.speed import Speed

MAX_SNAPSHOTS = 80  # Of the layers over training: more columns than that add bytes, not sight.
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a report shows; plain values only. Values that are not finite are drawn as gaps."""

    name: str
    """Name of the run."""
    model: str
    """Where the dense model came from."""
    method: str
    """A key of `mgpp.METHODS` or `mgpp.ONE_SHOT`."""
    metric: str
    """Headline metric, a key of the entries of `metrics`."""
    kinds: dict[str, Metric]
    """What each metric is, and how it is written."""
    metrics: dict[str, dict[str, float]]
    """Metrics by model: "pruned" and, where a dense model was evaluated, "dense"."""
    sparsity: float
    """Exact share of zeros over all prunable weights, in [0, 1]."""
    num_pruned: int
    num_prunable: int
    num_parameters: int
    model_zeros: int
    """Zeros of the whole model."""
    left_out: dict[str, int]
    """Elements of large matrices that are not prunable, by name."""
    warnings: list[str]
    """What the reader should know of the outcome."""
    sizes: dict[str, int]
    """Bytes on disk by label."""
    embeddings: dict[str, int]
    """Bytes of these that are embeddings, for labels where that is known."""
    compressed: dict[str, int]
    """Bytes that files come to when compressed, for labels where that is known."""
    seconds: dict[str, float]
    """Wall seconds by stage, in the order run."""
    steps: list[dict[str, Any]]
    """Training records of the pruned run: step, loss (nats), lr, mask_sparsity (share of the prunable
    weights that the last mask prunes; until it is fixed they train on), threshold (of |w|), slab_prob
    (None without a prior), tokens_per_second, grad_norm. All but step may be absent."""
    dense_steps: list[dict[str, Any]]
    """The same of the dense fine-tune; may be empty."""
    prunings: list[dict[str, Any]]
    """A record a pruning: step, sparsity, num_pruned, threshold (of |w|), spike_share (share of
    prunable weights below the spike threshold), churn (share of the pruned set that is newly
    pruned), mask_hash, moved_median and moved_p99 (how far pruned weights had moved from zero, in cuts;
    None where there is none)."""
    layers: list[dict[str, Any]]
    """At some prunings, the last being final: step, and sparsity, a dict by weight name."""
    phases: dict[str, int]
    """prune_start, prune_end, num_steps."""
    config: str
    """The run's config, YAML."""
    versions: dict[str, str]
    """Version by package."""
    speed: Speed | None = None
    """What a benchmark of the exported model found, where there was one."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A headline figure with the numbers behind it; `tone` is good, bad, or empty."""

    label: str
    value: str
    note: str = ""
    tone: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)


def _minus(text: str) -> str:
    """A number with the sign that typography has for it."""
    return text.replace("-", MINUS)


def _bytes(count: int) -> str:
    """A size as text, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    """A wall time as text."""
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _difference(data: ReportData, key: str) -> float | None:
    """Metric of the pruned model less that of the dense; None where either is missing."""
    dense, pruned = (data.metrics.get(run, {}).get(key) for run in ("dense", "pruned"))
    return None if dense is None or pruned is None else finite(pruned - dense)


def _metric_card(data: ReportData) -> Card:
    metric = data.kinds[data.metric]
    dense = data.metrics.get("dense", {}).get(data.metric)
    value = _minus(metric.text(data.metrics.get("pruned", {}).get(data.metric)))
    label = data.metric.replace("_", " ")
    difference = _difference(data, data.metric)
    if difference is None:
        return Card(label=label, value=value, note="pruned model")
    rows = [("dense", metric.text(dense)), ("difference", metric.difference(difference))]
    if dense:
        rows.append(("relative", f"{difference / abs(dense):+.2%}"))
    rows = [(name, _minus(text)) for name, text in rows]
    better = (difference > 0) == metric.higher_is_better
    tone, note = ("good", "better than dense") if better else ("bad", "worse than dense")
    if difference == 0:
        tone, note = "good", "equal to dense"
    return Card(label=label, value=value, note=note, tone=tone, rows=rows)


def _cards(data: ReportData) -> list[Card]:
    """Headline figures; a card without data is left out."""
    counts = {
        "pruned": data.num_pruned,
        "prunable": data.num_prunable,
        "parameters": data.num_parameters,
    }
    rows = [(label, f"{count:,}") for label, count in counts.items()]
    rows.append(("sparsity of all weights", f"{data.model_zeros / data.num_parameters:.2%}"))
    rows += [(f"not prunable: {name}", f"{numel:,}") for name, numel in data.left_out.items()]
    sparsity = Card(
        label="sparsity", value=f"{data.sparsity:.2%}", note="of the prunable weights", rows=rows
    )
    cards = [_metric_card(data), sparsity]
    if data.sizes:
        smallest = min(data.sizes, key=data.sizes.__getitem__)
        sizes = [(label, _size_text(data, label)) for label in data.sizes]
        value = _bytes(data.sizes[smallest])
        cards.append(Card(label="size on disk", value=value, note=smallest, rows=sizes))
    if data.seconds:
        rates = [finite(record.get("tokens_per_second")) for record in data.steps]
        speed = [rate for rate in rates if rate is not None]
        rows = [("stages", f"{len(data.seconds)}")]
        if data.phases.get("num_steps"):  # 0 where nothing is trained
            rows.append(("training steps", f"{data.phases['num_steps']:,}"))
        if speed:
            rows.append(("median tokens/s", f"{median(speed):,.0f}"))
        total = sum(value for value in data.seconds.values() if math.isfinite(value))
        cards.append(Card(label="time", value=_duration(total), note="wall time", rows=rows))
    return cards


def _size_text(data: ReportData, label: str) -> str:
    size, embeddings = data.sizes[label], data.embeddings.get(label)
    share = "" if embeddings is None else f", {embeddings / size:.0%} embeddings"
    compressed = data.compressed.get(label)
    packed = "" if compressed is None else f", {_bytes(compressed)} compressed"
    return f"{_bytes(size)}{share}{packed}"


def _metric_rows(data: ReportData) -> list[tuple[str, str, str, str]]:
    """Name, dense, pruned, difference of every metric, as text, the headline first."""
    dense, pruned = (data.metrics.get(run, {}) for run in ("dense", "pruned"))
    keys = sorted({**pruned, **dense}, key=lambda key: key != data.metric)
    return [
        (
            key,
            _minus(data.kinds[key].text(dense.get(key))),
            _minus(data.kinds[key].text(pruned.get(key))),
            _minus(data.kinds[key].difference(_difference(data, key))),
        )
        for key in keys
    ]


def _result_plots(data: ReportData) -> list[Plot]:
    labels = {key: (dense, pruned) for key, dense, pruned, _ in _metric_rows(data)}
    dense, pruned = (data.metrics.get(run, {}) for run in ("dense", "pruned"))
    caption = "The dense model is 100%. At the bars' ends: the values."
    bars = figures.metric_figure(dense, pruned, labels)
    return [Plot(title="Pruned against dense", caption=caption, figure=bars)]


def _training_plots(data: ReportData, spans: Spans) -> list[Plot]:
    caption = "Faint: single records. Solid: a moving average over a fortieth of the run."
    losses = [finite(r["loss"]) for r in data.steps if r.get("loss") is not None]
    if bad := losses.count(None):
        caption += f" {bad:,} of {len(losses):,} losses of the pruned run are not finite."
    loss = figures.loss_figure(data.steps, data.dense_steps, spans)
    plots = [Plot(title="Training loss", caption=caption, figure=loss, wide=True)]
    for title, curve in figures.STEP_CURVES.items():
        plots.append(Plot(title=title, figure=figures.curve_figure(data.steps, curve, spans)))
    return plots


def _pruning_plots(data: ReportData, spans: Spans) -> list[Plot]:
    spike = figures.spike_figure(data.prunings, spans)
    churn = figures.churn_figure(data.prunings, spans)
    shots = thinned([shot for shot in data.layers if shot["sparsity"]], MAX_SNAPSHOTS)
    caption = "Weights below the spike threshold, beside those pruned."
    plots = [Plot(title="Weights in the spike", caption=caption, figure=spike)]
    caption = "How much of each pruned set, after the first, was not pruned the time before."
    plots.append(Plot(title="Churn", caption=caption, figure=churn))
    caption = (
        "Of the weights pruned the time before, how far half and 99 in a hundred had moved from zero "
        "when the next pruning came, in units of its cut. Above 1, dotted, a weight comes back."
    )
    moved = figures.displacement_figure(data.prunings, spans)
    plots.append(Plot(title="Pruned weights between prunings", caption=caption, figure=moved))
    if shots:
        matrix, history = layer_matrix(shots[-1]["sparsity"]), layer_history(shots)
        steps = [shot["step"] for shot in shots]
        final = figures.layer_figure(matrix.rows, matrix.columns, matrix.values)
        differences = difference_to_mean(history.values)
        over_steps = figures.layer_history_figure(
            history.rows, steps, history.values, differences, spans
        )
        caption = f"At the last pruning recorded, step {steps[-1]:,}. Colours span the range found."
        title = "Sparsity by layer and matrix"
        plots.append(Plot(title=title, caption=caption, figure=final, wide=True))
        title = "Sparsity by layer over training"
        caption = "Above (blue) or below (brown) the mean layer, each mask until the next recorded."
        plots.append(Plot(title=title, caption=caption, figure=over_steps, wide=True))
    return plots


def _drawn(plots: list[Plot]) -> list[Plot]:
    """The plots that have a figure, two a row; a half-width one left over becomes wide."""
    plots = [plot for plot in plots if plot.figure is not None]
    halves = [index for index, plot in enumerate(plots) if not plot.wide]
    if len(halves) % 2:
        plots[halves[-1]] = replace(plots[halves[-1]], wide=True)
    return plots


def _sections(data: ReportData, spans: Spans) -> dict[str, list[Plot]]:
    """Plots by section, without those that have nothing to draw."""
    labels = {stage: _duration(value) for stage, value in data.seconds.items()}
    bars = figures.time_figure(data.seconds, labels)
    time = Plot(title="Time by stage", caption="Wall time, in order.", figure=bars, wide=True)
    return {
        # Beside the table of metrics, which takes the other half of the row.
        "Result": [plot for plot in _result_plots(data) if plot.figure is not None],
        "Training": _drawn(_training_plots(data, spans)),
        "Pruning": _drawn(_pruning_plots(data, spans)),
        "Time": _drawn([time]),
    }


def render_report(data: ReportData) -> str:
    """The HTML page of a run. It holds all it needs: scripts, styles and data."""
    spans = phase_spans(data.phases)
    method = METHODS.get(data.method) or ONE_SHOT.get(data.method)
    return render_page(
        "report.html.jinja",
        data=data,
        method=method.title if method else data.method,
        cards=_cards(data),
        metric_rows=_metric_rows(data),
        speed=data.speed,
        sections=_sections(data, spans),
        spans=spans,
        mask_hash=data.prunings[-1].get("mask_hash") if data.prunings else None,
    )
