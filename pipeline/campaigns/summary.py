"""What came of a campaign as tables: its runs, and their summary over the seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.campaigns.config import DENSE, CampaignConfig
from pipeline.campaigns.curves import Curves, LossCurve, curve_places, curve_points, loss_tables
from pipeline.campaigns.grid import CampaignRun, Place
from pipeline.campaigns.overrides import Changes
from pipeline.campaigns.selection import Choice, was_chosen
from pipeline.metric import Metric, defined

RUNS, SUMMARY, SELECTION, CURVES = "runs", "summary", "selection", "curves"
MARKDOWN_FILE = "summary.md"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    Attributes:
        run: of the campaign.
        metric: its task's headline metric.
        metrics: all of them, of the pruned model or of the dense one; empty if it failed.
        seconds: wall seconds of each stage when it ran, whichever run made it.
        num_workers: of its worker group.
        url: of its last artifact; empty if it failed.
        failure: why it failed; empty if it did not.
        curve: how its training went; None where that is not asked for, or it did not prune in training.
    """

    run: CampaignRun
    metric: Metric
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    num_workers: int
    url: str
    failure: str
    curve: LossCurve | None = None

    @property
    def own_seconds(self) -> float:
        """Wall seconds of what no other run shares: not of data and dense fine-tune."""
        shared = {"data", "dense"} if self.run.place.is_pruned else {"data"}
        return sum(seconds for stage, seconds in self.seconds.items() if stage not in shared)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs at one place of the table, over the seeds.

    Attributes:
        place: task, model, method and sparsity.
        metric: the headline metric.
        values: it, of each seed that is done; NaN where it is not a number.
        worker_seconds: wall seconds times workers of each of these.
        num_failed: how many seeds failed.
        settings: the changes of the candidate that was chosen.
    """

    place: Place
    metric: Metric
    values: tuple[float, ...]
    worker_seconds: tuple[float, ...]
    num_failed: int
    settings: Changes

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where none is done, NaN where the metric of one is not a number."""
        return mean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two, or without a mean."""
        known = len(self.values) > 1 and all(map(isfinite, self.values))
        return stdev(self.values) if known else None

    @property
    def text(self) -> str:
        """Mean and spread, for people."""
        if self.mean is None:
            return "failed"
        missing = f" ({self.num_failed} failed)" if self.num_failed else ""
        return self.metric.mean_and_spread(self.mean, self.spread) + missing


@dataclass(frozen=True, kw_only=True)
class Table:
    """A task's and model's part of the summary, for people.

    Attributes:
        title: task and model, as far as the campaign names them, and the metric.
        columns: the sparsities.
        rows: of each method, its name and a text a column.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def groups(config: CampaignConfig, outcomes: Sequence[Outcome]) -> list[Group]:
    """Return the summary of the runs over the seeds, in the order of the runs."""
    together: dict[Place, list[Outcome]] = {}
    for outcome in outcomes:
        together.setdefault(outcome.run.place, []).append(outcome)
    return [
        Group(
            place=place,
            metric=of[0].metric,
            values=tuple(o.metrics[o.metric.name] for o in of if not o.failure),
            worker_seconds=tuple(o.own_seconds * o.num_workers for o in of if not o.failure),
            num_failed=sum(1 for o in of if o.failure),
            settings=(
                config.methods[place.method].candidates[of[0].run.candidate]
                if place.is_pruned
                else {}
            ),
        )
        for place, of in together.items()
    ]


def write_summary(
    folder: Path, config: CampaignConfig, outcomes: Sequence[Outcome], choice: Choice
) -> dict[str, Any]:
    """Write all tables to `folder`, which is there.

    Returns:
        The summary and the selection, plain values.
    """
    summary = groups(config, outcomes)
    curves = curves_of(outcomes)
    selection = [_selection_row(config, outcomes, choice, run) for run in choice.scores]
    for name, rows in (
        (RUNS, [_run_row(outcome) for outcome in outcomes]),
        (SUMMARY, [{**_summary_row(g), "settings": json.dumps(g.settings)} for g in summary]),
        (SELECTION, [{**row, "settings": json.dumps(row["settings"])} for row in selection]),
        (CURVES, list(curve_points(curves))),
    ):
        if rows:
            _write_table(folder, name, rows)
    (folder / MARKDOWN_FILE).write_text(markdown(summary, curves), encoding="utf-8")
    return {
        "rows": [
            {
                **_summary_row(g),
                "values": [defined(value) for value in g.values],
                "settings": g.settings,
            }
            for g in summary
        ],
        "selection": selection,
        "num_failed": sum(1 for outcome in outcomes if outcome.failure),
    }


def curves_of(outcomes: Sequence[Outcome]) -> Curves:
    """Return the curves that there are."""
    return {outcome.run: outcome.curve for outcome in outcomes if outcome.curve is not None}


def place_title(task: str, model: str) -> str:
    """Return a task and a model as far as the campaign names them."""
    return ", ".join(part for part in (task, model) if part)


def tables(summary: Sequence[Group]) -> list[Table]:
    """Return a table for each task and model: methods by sparsities, mean and spread as text."""
    found = []
    for task, model in dict.fromkeys((g.place.task, g.place.model) for g in summary):
        mine = [g for g in summary if (g.place.task, g.place.model) == (task, model)]
        texts = {(g.place.method, g.place.sparsity): g.text for g in mine}
        sparsities = sorted({g.place.sparsity for g in mine if g.place.is_pruned})
        rows = []
        for method in dict.fromkeys(g.place.method for g in mine):
            at = [0.0] * len(sparsities) if method == DENSE else sparsities
            rows.append((method, [texts.get((method, s), "") for s in at]))
        title = ": ".join(filter(None, (place_title(task, model), mine[0].metric.title)))
        found.append(
            Table(title=title, columns=[f"{100 * s:g}% zeros" for s in sparsities], rows=rows)
        )
    return found


def markdown(summary: Sequence[Group], curves: Curves) -> str:
    """Return the summary's tables, and after them the training losses, as Markdown."""
    parts = [_markdown_table(table.title, table.columns, table.rows) for table in tables(summary)]
    for task, model in curve_places(curves):
        place = place_title(task, model)
        for title, columns, rows in loss_tables(curves, task, model):
            parts.append(_markdown_table(f"{place}: {title}" if place else title, columns, rows))
    return "\n".join(parts)


def _markdown_table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> str:
    lines = [
        f"**{title}**",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *("| " + " | ".join([name, *texts]) + " |" for name, texts in rows),
    ]
    return "\n".join(lines) + "\n"


def _run_row(outcome: Outcome) -> dict[str, Any]:
    return {
        **outcome.run.place._asdict(),
        "seed": outcome.run.seed,
        "candidate": outcome.run.candidate + 1,
        "state": "failed" if outcome.failure else "done",
        "failure": outcome.failure,
        "url": outcome.url,
        "num_workers": outcome.num_workers,
        **{f"seconds.{stage}": seconds for stage, seconds in outcome.seconds.items()},
        **{f"metric.{name}": defined(value) for name, value in outcome.metrics.items()},
    }


def _summary_row(group: Group) -> dict[str, Any]:
    return {
        **group.place._asdict(),
        "metric": group.metric.name,
        "mean": defined(group.mean),
        "spread": group.spread,
        "num_seeds": len(group.values),
        "num_failed": group.num_failed,
        "worker_seconds": mean(group.worker_seconds) if group.worker_seconds else None,
    }


def _selection_row(
    config: CampaignConfig, outcomes: Sequence[Outcome], choice: Choice, run: CampaignRun
) -> dict[str, Any]:
    metric = next(o.metric for o in outcomes if o.run.place.task == run.place.task)
    return {
        **run.place._asdict(),
        "seed": run.seed,
        "candidate": run.candidate + 1,
        "settings": config.methods[run.place.method].candidates[run.candidate],
        "metric": metric.name,
        "value": defined(choice.scores[run]),
        "chosen": was_chosen(config, run, choice.chosen),
    }


def _write_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV and Parquet, with the columns of all of them."""
    import pyarrow  # slow to import
    from pyarrow import csv, parquet

    columns = dict.fromkeys(column for row in rows for column in row)
    table = pyarrow.table({column: [row.get(column) for row in rows] for column in columns})
    csv.write_csv(table, folder / f"{name}.csv")
    parquet.write_table(table, folder / f"{name}.parquet")
