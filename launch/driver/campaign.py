"""A campaign on Ray: its cells run, what came of them, and how they stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from launch.driver.locking import made_once
from launch.driver.many_runs import PlannedRun, plan_run, run_all
from pipeline.campaigns.grid import VERSION, CampaignCell, CampaignConfig, campaign_cells
from pipeline.campaigns.report import CellResult, write_campaign
from pipeline.errors import ConfigError
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import Artifact, ArtifactStore, make_key
from pipeline.store.leases import LeaseFolder
from pipeline.tasks import make_task

_LAST_STAGES = ("export", "report")


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A cell with the run it is."""

    cell: CampaignCell
    run: PlannedRun


@dataclass(frozen=True, kw_only=True)
class CellState:
    """How a cell stands.

    Attributes:
        title: of the cell.
        state: "done", "running", "failed" or "waiting".
        note: its metric, who works on what stage, or why it failed.
        progress: the newest record of a running stage.
    """

    title: str
    state: str
    note: str
    progress: dict[str, Any] | None = None


def plan_campaign(config: CampaignConfig) -> list[PlannedCell]:
    """Return every cell with its run.

    Raises:
        ConfigError: with the problems of all cells whose configuration cannot be.
    """
    planned, problems = [], []
    for cell in campaign_cells(config):
        without = () if config.export and cell.is_pruned else _LAST_STAGES
        try:
            run = plan_run(
                cell.title, cell.recipe, cell.overrides, pruned=cell.is_pruned, without=without
            )
        except ConfigError as error:
            problems += error.problems
            continue
        planned.append(PlannedCell(cell=cell, run=run))
    if problems:
        raise ConfigError(problems)
    return planned


def run_campaign(
    config: CampaignConfig, planned: Sequence[PlannedCell], store: ArtifactStore, console: Console
) -> Artifact:
    """Run all cells that are not done, and write tables and page; the cluster must be connected.

    Returns:
        The artifact with the tables, what failed told in it too.
    """
    by_title = {p.run.title: p for p in planned}
    failures = run_all(
        [p.run for p in planned],
        store,
        console,
        at_once=config.runs_at_once,
        score=lambda run: _told(_result(by_title[run.title], store, "")),
    )
    results = [_result(p, store, failures.get(p.run.title, "")) for p in planned]
    params = config.model_dump(mode="json", exclude={"storage", "runs_at_once"})
    inputs = {p.run.title: p.run.stages[-1].key for p in planned}
    key = make_key("campaign", VERSION, {**params, "failures": failures}, inputs)
    stage = PlannedStage(name="campaign", key=key, params=params, inputs=(), on_all_workers=False)
    return made_once(
        stage, store, lambda folder: write_campaign(folder, config, results), tell=console.print
    )


def campaign_states(planned: Sequence[PlannedCell], store: ArtifactStore) -> list[CellState]:
    """Return how each cell stands, from the store alone: no matter where the campaign runs."""
    return [_state(p, store) for p in planned]


def _state(planned: PlannedCell, store: ArtifactStore) -> CellState:
    title, stages = planned.run.title, planned.run.stages
    if all(store.find(stage.name, stage.key) is not None for stage in stages):
        return CellState(title=title, state="done", note=_told(_result(planned, store, "")))
    for stage in stages:
        if store.find(stage.name, stage.key) is not None:
            continue
        lease = LeaseFolder(store.folder_of(stage.name, stage.key)).newest()
        if lease is not None and lease.is_held:
            return CellState(
                title=title,
                state="running",
                note=f"{stage.name}, {lease}",
                progress=lease.progress,
            )
    failure = store.failure(stages[-1].name, stages[-1].key)
    if failure is not None:
        return CellState(title=title, state="failed", note=failure)
    return CellState(title=title, state="waiting", note="")


def _result(planned: PlannedCell, store: ArtifactStore, failure: str) -> CellResult:
    cell, run = planned.cell, planned.run
    task = make_task(run.config.task)
    found = {stage.name: store.find(stage.name, stage.key) for stage in run.stages}
    artifacts = {name: artifact for name, artifact in found.items() if artifact is not None}
    evaluated, last = artifacts.get("evaluate"), artifacts.get(run.stages[-1].name)
    label = "pruned" if cell.is_pruned else "dense"
    return CellResult(
        cell=cell,
        headline=task.headline,
        higher_is_better=task.higher_is_better,
        metrics=dict(evaluated.metrics[label]) if evaluated and not failure else {},
        seconds={name: artifact.seconds for name, artifact in artifacts.items()},
        num_workers=run.config.cluster.num_workers,
        url=last.url if last else "",
        failure=failure,
    )


def _told(result: CellResult) -> str:
    return f"{result.headline} {result.metrics[result.headline]:.4f}"
