"""The summary of a campaign over its seeds, its tables and its page; figures by hand."""

import csv
import json
import math
from statistics import mean, stdev

import pandas
import pytest
import yaml

from pipeline import metric
from pipeline.campaigns.curves import loss_curve
from pipeline.campaigns.grid import campaign_runs, read_campaign
from pipeline.campaigns.report import outliers, render_campaign, write_campaign
from pipeline.campaigns.selection import Choice, choose, selection_runs
from pipeline.campaigns.summary import groups
from tests.html_page import Page
from tests.pipeline.campaigns.outcomes import outcome

GRID = {
    "name": "grid",
    "tasks": {"sst2": {}, "rte": {}},
    "recipe": "recipe.yaml",
    "models": {"small": {"model.path": "a"}, "large": {"model.path": "b"}},
    "methods": {
        "GMP": {"prune": {"method": {"name": "gmp"}}},
        "MGPP": {"prune": {"method": {"name": "mgpp"}}},
    },
    "sparsities": [0.9, 0.95],
    "seeds": [0, 1, 2],
}
ONE = {"tasks": {}, "models": {}}
CANDIDATES = {
    "GMP": {"candidates": [{"train.lr": 0.1}, {"train.lr": 0.2}]},
    "MGPP": {"candidates": [{"train.lr": 0.3}, {"train.lr": 0.4}]},
}

RECORDS = [
    {"step": step, "loss": loss, "mask_sparsity": sparsity}
    for step, loss, sparsity in zip(
        range(2, 12, 2), (0.9, 0.8, 0.6, 0.5, 0.4), (0.0, 0.5, 0.85, 0.9, 0.9), strict=True
    )
]


@pytest.fixture
def read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: recipe\n")

    def write_and_read(**changes):
        path = tmp_path / "campaign.yaml"
        path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
        return read_campaign(str(path))

    return write_and_read


def outcomes(config, **changes):
    broken = "sst2 small GMP 90% seed 1"
    return [
        outcome(run, 0.5 + i / 1000, failure="it <broke>" if run.title == broken else "", **changes)
        for i, run in enumerate(campaign_runs(config))
    ]


def test_the_summary_is_over_the_seeds_that_are_done(read):
    config = read()
    found = outcomes(config)
    summary = {g.place: g for g in groups(config, found)}
    assert len(summary) == 2 * 2 * (2 * 2 + 1)
    whole = [
        o.metrics["accuracy"] for o in found if o.run.title.startswith("rte large MGPP 95% seed")
    ]
    group = summary["rte", "large", "MGPP", 0.95]
    assert (group.mean, group.spread) == (mean(whole), stdev(whole))
    assert group.worker_seconds == ((20.0 + 3.0) * 4,) * 3
    assert summary["rte", "large", "dense", 0.0].worker_seconds == ((10.0 + 20.0 + 3.0) * 4,) * 3
    broken = summary["sst2", "small", "GMP", 0.9]
    assert (len(broken.values), broken.num_failed) == (2, 1)
    assert "(1 failed)" in broken.text


def test_the_tables_are_read_by_other_tools(read, tmp_path):
    config = read()
    found = outcomes(config)
    written = write_campaign(tmp_path, config, found)
    assert written["num_failed"] == 1
    runs = pandas.read_parquet(tmp_path / "runs.parquet")
    assert len(runs) == len(found)
    assert runs["metric.accuracy"].isna().sum() == 1
    row = runs[runs.url == found[5].url].iloc[0]
    assert row["metric.accuracy"] == found[5].metrics["accuracy"]
    by_hand = runs[runs.state == "done"].groupby(["task", "model", "method", "sparsity"])
    summary = pandas.read_parquet(tmp_path / "summary.parquet").set_index(
        ["task", "model", "method", "sparsity"]
    )
    pandas.testing.assert_series_equal(
        by_hand["metric.accuracy"].mean().sort_index(),
        summary["mean"].sort_index(),
        check_names=False,
    )
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(runs.method)
    table = (tmp_path / "summary.md").read_text()
    assert table.count("| MGPP |") == 4
    assert "| | 90% zeros | 95% zeros |" in table
    assert "**rte, large: accuracy (%)**" in table
    assert not list(tmp_path.glob("curves.*"))
    assert "Training loss" not in table


def test_a_table_of_one_task_has_the_dense_model_in_every_column(read, tmp_path):
    config = read(**ONE, seeds=[3, 5])
    values = {"dense": (0.96, 0.94), "GMP": (0.5, 0.6), "MGPP": (0.91, 0.93)}
    found = [outcome(run, values[run.place.method][run.seed == 5]) for run in campaign_runs(config)]
    written = write_campaign(tmp_path, config, found)
    assert (tmp_path / "summary.md").read_text() == (
        "**accuracy (%)**\n\n"
        "| | 90% zeros | 95% zeros |\n"
        "|---|---|---|\n"
        "| dense | 95.00 ± 1.41 | 95.00 ± 1.41 |\n"
        "| GMP | 55.00 ± 7.07 | 55.00 ± 7.07 |\n"
        "| MGPP | 92.00 ± 1.41 | 92.00 ± 1.41 |\n"
    )
    assert written["rows"][0]["values"] == [0.96, 0.94]


def test_a_metric_that_is_not_a_number_is_absent(read, tmp_path):
    """Of one seed of GMP, as a correlation with predictions that are all the same."""
    config = read(**ONE, seeds=[0, 1])
    found = [
        outcome(run, math.nan if run.place.method == "GMP" and run.seed else 0.5)
        for run in campaign_runs(config)
    ]
    written = write_campaign(tmp_path, config, found)
    rows = {row["method"]: row for row in json.loads(json.dumps(written, allow_nan=False))["rows"]}
    assert (rows["GMP"]["mean"], rows["GMP"]["spread"]) == (None, None)
    assert rows["GMP"]["values"] == [0.5, None]
    assert (rows["MGPP"]["mean"], rows["MGPP"]["spread"]) == (0.5, 0.0)
    assert "| GMP | n/a | n/a |" in (tmp_path / "summary.md").read_text()
    runs = pandas.read_parquet(tmp_path / "runs.parquet")
    assert runs["metric.accuracy"].isna().sum() == 2


def test_a_perplexity_is_written_as_it_is(read, tmp_path):
    config = read(**ONE, seeds=[0])
    perplexities = {"dense": 12.0, "GMP": 18.5, "MGPP": 14.25}
    perplexity = metric.perplexity("perplexity")
    found = [
        outcome(run, perplexities[run.place.method], metric=perplexity)
        for run in campaign_runs(config)
    ]
    write_campaign(tmp_path, config, found)
    table = (tmp_path / "summary.md").read_text()
    assert "**perplexity**" in table
    assert "| dense | 12.00 | 12.00 |" in table
    assert "| MGPP | 14.25 | 14.25 |" in table
    summary = pandas.read_csv(tmp_path / "summary.csv")
    assert set(summary["mean"]) == {12.0, 18.5, 14.25}
    page = Page(render_campaign(config, found))
    assert "18.50" in page.text
    (figure,) = page.figures
    assert figure["data"][0]["y"] == [18.5, 18.5]
    assert figure["layout"]["yaxis"]["title"]["text"] == "perplexity"


def test_a_share_is_drawn_in_percent(read):
    config = read(**ONE, seeds=[0, 1])
    found = [outcome(run, 0.9 + 0.02 * run.seed) for run in campaign_runs(config)]
    (figure,) = Page(render_campaign(config, found)).figures
    lines = {t["name"]: t for t in figure["data"] if "lines" in t["mode"]}
    assert lines["GMP"]["y"] == pytest.approx([91.0, 91.0])
    assert lines["dense"]["y"] == pytest.approx([91.0, 91.0])
    points = [t for t in figure["data"] if t["mode"] == "markers"]
    assert points[0]["y"] == pytest.approx([90.0, 92.0, 90.0, 92.0])
    assert figure["layout"]["yaxis"]["title"]["text"] == "accuracy (%)"


@pytest.mark.parametrize("made", [metric.share("accuracy"), metric.perplexity("perplexity")])
def test_what_is_far_worse_than_the_rest_is_named_and_not_drawn(read, made):
    config = read(**ONE, seeds=[0])
    close, far = ((0.96, 0.95, 0.94), 0.57) if made.higher_is_better else ((12, 13, 14), 4000.0)
    values = dict(zip(("dense", "MGPP"), close, strict=False))
    found = [
        outcome(
            run,
            values.get(run.place.method, close[2] if run.place.sparsity < 0.95 else far),
            metric=made,
        )
        for run in campaign_runs(config)
    ]
    assert [g.place for g in outliers(groups(config, found))] == [("", "", "GMP", 0.95)]
    (figure,) = Page(render_campaign(config, found)).figures
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < min(close) * made.scale < max(close) * made.scale < high
    assert not low < far * made.scale < high
    (note,) = figure["layout"]["annotations"]
    assert note["text"] == f"not drawn: GMP 95% {made.text(far)}"


def test_methods_that_are_alike_are_all_drawn(read):
    config = read(**ONE, seeds=[0])
    found = [outcome(run, 0.9 + i / 100) for i, run in enumerate(campaign_runs(config))]
    assert outliers(groups(config, found)) == []


def test_the_page_shows_every_task_and_what_failed(read):
    config = read()
    html = render_campaign(config, outcomes(config))
    page = Page(html)
    for place in ("sst2, small", "sst2, large", "rte, small", "rte, large"):
        assert f"{place}: accuracy (%)" in page.titles
    assert "it <broke>" in page.text
    assert "it &lt;broke&gt;" in html
    assert "it <broke>" not in html
    assert len(page.figures) == 4


def test_tables_and_page_say_what_was_chosen(read, tmp_path):
    config = read(
        **ONE, seeds=[0], methods=CANDIDATES, selection={"changes": {"data.split_seed": 1}}
    )
    accuracy = metric.share("accuracy")
    scores = {run: 0.8 + run.candidate / 10 for run in selection_runs(config)}
    choice = Choice(scores=scores, chosen=choose(config, scores, {"": accuracy}))
    found = [outcome(run, 0.7) for run in campaign_runs(config, choice.chosen)]
    written = write_campaign(tmp_path, config, found, choice)
    assert [row["settings"] for row in written["rows"]] == [
        {},
        {"train.lr": 0.2},
        {"train.lr": 0.4},
        {"train.lr": 0.2},
        {"train.lr": 0.4},
    ]
    table = pandas.read_parquet(tmp_path / "selection.parquet")
    assert len(table) == 2 * 2 * 2
    assert list(table["chosen"]) == [candidate == 2 for candidate in table["candidate"]]
    assert {json.loads(text)["train.lr"] for text in table[table.chosen]["settings"]} == {0.2, 0.4}
    summary = pandas.read_csv(tmp_path / "summary.csv")
    assert json.loads(summary["settings"][1]) == {"train.lr": 0.2}
    text = Page((tmp_path / "report.html").read_text()).text
    assert "GMP 90% candidate 2 seed 0" in text
    assert '{"train.lr": 0.4}' in text
    assert "80.00%" in text


def test_curves_are_written_tabulated_and_drawn(read, tmp_path):
    config = read(**ONE, seeds=[0, 1], curves=True)
    found = [
        outcome(run, 0.9, curve=loss_curve(RECORDS) if run.place.is_pruned else None)
        for run in campaign_runs(config)
    ]
    write_campaign(tmp_path, config, found)
    with (tmp_path / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 2 * 2 * 2 * len(RECORDS)
    assert [float(p["loss"]) for p in points[: len(RECORDS)]] == [r["loss"] for r in RECORDS]
    assert len(pandas.read_parquet(tmp_path / "curves.parquet")) == len(points)
    table = (tmp_path / "summary.md").read_text()
    assert "**Training loss on the way to 95%**" in table
    assert "| MGPP | 0.800 | 0.600 | 0.600 | 0.500 | 0.400 |" in table
    page = Page((tmp_path / "report.html").read_text())
    assert "grid: training loss" in page.titles
    figure = page.figures[-1]
    drawn = [trace for trace in figure["data"] if trace["name"] == "GMP"]
    assert len(drawn) == 2 * 2 * 2  # seeds, sparsities, loss and zeros
    assert drawn[0]["y"] == [r["loss"] for r in RECORDS]
    assert drawn[1]["y"] == [r["mask_sparsity"] for r in RECORDS]
    assert sum(trace.get("showlegend", True) for trace in drawn) == 1


def test_names_are_escaped_in_the_figures(read):
    methods = {"<b>A</b>": {"prune.method": {"name": "gmp"}}}
    config = read(**ONE, seeds=[0], methods=methods)
    found = [outcome(run, 0.9, curve=loss_curve(RECORDS)) for run in campaign_runs(config)]
    page = Page(render_campaign(config, found))
    names = {trace["name"] for figure in page.figures for trace in figure["data"]}
    assert "&lt;b&gt;A&lt;/b&gt;" in names
    assert "<b>A</b>" not in names


def test_the_loss_is_read_where_the_sparsity_first_reaches_a_level():
    # 0.9 is reached at step 8; half, three quarters, nine tenths of it before or there.
    curve = loss_curve(RECORDS)
    assert curve.losses_at_levels() == (0.8, 0.6, 0.6, 0.5, 0.4)


def test_what_a_teacher_adds_to_the_loss_is_left_out():
    records = [{**r, "loss": 7.0, "task_loss": r["loss"]} for r in RECORDS]
    assert loss_curve(records) == loss_curve(RECORDS)
