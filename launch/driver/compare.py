"""The cells of a comparison on Ray: some at a time, each only if its metric is not there already."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from launch.driver.locking import made_once
from launch.driver.many_runs import PlannedRun, plan_run, run_all
from pipeline.campaigns.comparison_report import write_comparison
from pipeline.campaigns.curves import LossCurve, loss_curve
from pipeline.campaigns.selection import (
    VERSION,
    Cell,
    ComparisonConfig,
    choose,
    final_cells,
    first_candidates,
    selection_cells,
    table,
)
from pipeline.errors import StageError
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import Artifact, ArtifactStore, make_key
from pipeline.tasks import make_task
from pipeline.tracking.recorder import METRICS_FILE, parse_records


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A cell with the run it is, up to its evaluation."""

    cell: Cell
    run: PlannedRun

    @property
    def score_key(self) -> tuple[str, str]:
        """Where its metric is in the store."""
        return self.run.stages[-1].name, self.run.stages[-1].key


def plan_cells(config: ComparisonConfig, cells: Sequence[Cell]) -> list[_Planned]:
    """Return each cell with its run.

    Raises:
        ConfigError: with every problem of the first cell that has any.
    """
    return [
        _Planned(
            cell=cell,
            run=plan_run(
                cell.title,
                config.recipe,
                cell.overrides,
                pruned=cell.is_pruned,
                without=("export", "report"),
            ),
        )
        for cell in cells
    ]


def run_comparison(config: ComparisonConfig, store: ArtifactStore, console: Console) -> Artifact:
    """Choose candidates, run the final cells, and write table and plot.

    Cells that are done are not run again; the cluster must be connected.

    Returns:
        The artifact with the table.

    Raises:
        ConfigError: if a cell's configuration cannot run.
        StageError: naming the cells that failed, once all others are done.
    """
    (first,) = plan_cells(config, final_cells(config, first_candidates(config))[:1])
    task = make_task(first.run.config.task)
    selecting = plan_cells(config, selection_cells(config))
    selection = _run_cells(selecting, store, config.cells_at_once, console, task.headline)
    chosen = choose(config, selection, higher_is_better=task.higher_is_better)
    finals = plan_cells(config, final_cells(config, chosen))
    scores = _run_cells(finals, store, config.cells_at_once, console, task.headline)
    rows = table(config, chosen, scores)
    params = config.model_dump(mode="json", exclude={"storage", "cells_at_once"})
    inputs = {p.cell.title: p.score_key[1] for p in [*selecting, *finals]}
    key = make_key("compare", VERSION, params, inputs)
    stage = PlannedStage(name="compare", key=key, params=params, inputs=(), on_all_workers=False)
    return made_once(
        stage,
        store,
        lambda folder: write_comparison(
            folder, config, rows, selection, _curves(finals, store), metric=task.headline
        ),
        tell=console.print,
    )


def _run_cells(
    planned: Sequence[_Planned], store: ArtifactStore, at_once: int, console: Console, metric: str
) -> dict[Cell, float]:
    """Run what is not done, `at_once` at a time; return each cell's metric."""
    if not planned:
        return {}
    cells = {p.cell.title: p for p in planned}
    failed = run_all(
        [p.run for p in planned],
        store,
        console,
        at_once=at_once,
        score=lambda run: f"{metric} {_score(cells[run.title], store, metric):.4f}",
    )
    if failed:
        raise StageError(
            f"{len(failed)} of {len(planned)} cells failed; the same command runs just these again:\n"
            + "\n".join(f"{title}: {reason}" for title, reason in failed.items())
        )
    return {p.cell: _score(p, store, metric) for p in planned}


def _curves(planned: Sequence[_Planned], store: ArtifactStore) -> dict[Cell, LossCurve]:
    """Return the training of each cell that pruned while it trained."""
    curves = {}
    for p in planned:
        key = next((stage.key for stage in p.run.stages if stage.name == "prune"), None)
        artifact = store.find("prune", key) if key else None
        if artifact and METRICS_FILE in artifact.files:
            records = parse_records(artifact.read_text(METRICS_FILE))
            curves[p.cell] = loss_curve(records["step"])
    return curves


def _score(planned: _Planned, store: ArtifactStore, metric: str) -> float:
    artifact = store.find(*planned.score_key)
    if artifact is None:
        raise StageError(f"{planned.cell.title} ended without an evaluation")
    label = "pruned" if planned.cell.is_pruned else "dense"
    return float(artifact.metrics[label][metric])
