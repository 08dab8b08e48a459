"""The cells of a comparison on Ray: some at a time, each only if its metric is not there already."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from launch.flow import all_done, run_stages
from launch.progress import describe, make_board
from pipeline.artifacts import Artifact, ArtifactStore, make_key
from pipeline.comparison import (
    VERSION,
    Cell,
    ComparisonConfig,
    choose,
    final_cells,
    first_candidates,
    selection_cells,
    table,
)
from pipeline.comparison_report import write_comparison
from pipeline.config import RunConfig, parse_config, read_config
from pipeline.errors import ConfigError, StageError
from pipeline.stage_keys import Stage, plan_stages
from pipeline.tasks import make_task

_POLL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A cell with what its run is made of."""

    cell: Cell
    config: RunConfig
    stages: list[Stage]

    @property
    def score_key(self) -> tuple[str, str]:
        """Where its metric is in the store."""
        return self.stages[-1].name, self.stages[-1].key


def plan_cells(config: ComparisonConfig, cells: Sequence[Cell]) -> list[_Planned]:
    """Return each cell's configuration and stages, up to its evaluation.

    Raises:
        ConfigError: with every problem of the first cell that has any.
    """
    planned = []
    for cell in cells:
        values, problems = read_config(config.recipe, cell.overrides)
        if problems:
            raise ConfigError([f"{cell.title}: {problem}" for problem in problems])
        try:
            settings = parse_config(values)
        except ConfigError as error:
            raise ConfigError([f"{cell.title}: {p}" for p in error.problems]) from None
        stages = plan_stages(settings, pruned=cell.is_pruned)
        planned.append(
            _Planned(
                cell=cell,
                config=settings,
                stages=[stage for stage in stages if stage.name not in ("export", "report")],
            )
        )
    return planned


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
    task = make_task(first.config.task)
    selecting = plan_cells(config, selection_cells(config))
    selection = _run_cells(selecting, store, config.cells_at_once, console, task.headline)
    chosen = choose(config, selection, higher_is_better=task.higher_is_better)
    finals = plan_cells(config, final_cells(config, chosen))
    scores = _run_cells(finals, store, config.cells_at_once, console, task.headline)
    rows = table(config, chosen, scores)
    params = config.model_dump(mode="json", exclude={"storage", "cells_at_once"})
    inputs = {p.cell.title: p.score_key[1] for p in [*selecting, *finals]}
    key = make_key("compare", VERSION, params, inputs)
    found = store.find("compare", key)
    if found is not None:
        return found
    attempt = store.begin("compare", key, params, {})
    metrics = write_comparison(attempt.folder, config, rows, selection, metric=task.headline)
    return attempt.commit(metrics, 0.0)


def _run_cells(
    planned: Sequence[_Planned], store: ArtifactStore, at_once: int, console: Console, metric: str
) -> dict[Cell, float]:
    """Run what is not done, `at_once` at a time; return each cell's metric."""
    missing = [p for p in planned if not all_done(p.stages, store)]
    if planned:
        done = len(planned) - len(missing)
        console.print(f"{len(planned)} cells, {done} of them done before", highlight=False)
    _run_data(missing, store)
    failed = _run_missing(missing, store, at_once, console, metric)
    if failed:
        raise StageError(
            f"{len(failed)} of {len(planned)} cells failed; the same command runs just these again:\n"
            + "\n".join(failed)
        )
    return {p.cell: _score(p, store, metric) for p in planned}


def _run_data(planned: Sequence[_Planned], store: ArtifactStore) -> None:
    """Prepare each dataset once before cells that share it start side by side."""
    for config, stage in {p.stages[0].key: (p.config, p.stages[0]) for p in planned}.values():
        run_stages([stage], config, store)


def _run_missing(
    missing: Sequence[_Planned], store: ArtifactStore, at_once: int, console: Console, metric: str
) -> list[str]:
    """Run cells as tasks; return a line for each that failed."""
    task = ray.remote(num_cpus=0, max_retries=0)(_run_cell)
    waiting, failed, ended = list(missing), [], 0
    running: dict[Any, tuple[_Planned, Any]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            cell, board = waiting.pop(0), make_board()
            running[task.remote(cell.stages, cell.config, store.url, board)] = (cell, board)
        ready, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
        for reference in ready:
            cell, _ = running.pop(reference)
            ended += 1
            place = f"{ended}/{len(missing)} {cell.cell.title}"
            try:
                ray.get(reference)
                console.print(
                    f"{place}: {metric} {_score(cell, store, metric):.4f}", highlight=False
                )
            except Exception as error:  # noqa: BLE001  # a cell that fails must not stop the others
                failed.append(f"{cell.cell.title}: {_reason(error)}")
                console.print(f"{place}: failed: {_reason(error)}", highlight=False)
        if not ready:
            _show(running.values(), console)
    return failed


def _show(running: Any, console: Console) -> None:
    for cell, board in running:
        records, _ = ray.get(board.latest.remote())
        for stage, record in list(records.items())[-1:]:
            if record is not None:
                console.print(f"  {cell.cell.title}: {stage} {describe(record)}", highlight=False)


def _run_cell(stages: list[Stage], config: RunConfig, storage: str, board: Any) -> None:
    """Run a cell's stages; a task of its own."""
    run_stages(stages, config, ArtifactStore(storage), board=board)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split())[:500]


def _score(planned: _Planned, store: ArtifactStore, metric: str) -> float:
    artifact = store.find(*planned.score_key)
    if artifact is None:
        raise StageError(f"{planned.cell.title} ended without an evaluation")
    label = "pruned" if planned.cell.is_pruned else "dense"
    return float(artifact.metrics[label][metric])
