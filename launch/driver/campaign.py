"""A campaign on Ray: candidates chosen, its runs run, what came of them, and how they stand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from rich.console import Console

from launch.driver.locking import made_once
from launch.driver.many_runs import PlannedRun, plan_run, run_all
from launch.driver.run import all_done
from launch.driver.stopping import StopSignals
from pipeline.campaigns.config import CampaignConfig
from pipeline.campaigns.curves import LossCurve, loss_curve
from pipeline.campaigns.grid import VERSION, CampaignRun, campaign_runs
from pipeline.campaigns.report import write_campaign
from pipeline.campaigns.selection import NO_CHOICE, Choice, choose, selection_runs
from pipeline.campaigns.summary import Outcome
from pipeline.errors import ConfigError, StageError
from pipeline.metric import Metric
from pipeline.runs.config import ClusterConfig, parse_sections, read_config
from pipeline.runs.hardware import Choices
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import Artifact, ArtifactStore, make_key
from pipeline.store.leases import LeaseFolder
from pipeline.tasks import make_task
from pipeline.tracking.recorder import METRICS_FILE, parse_records

_LAST_STAGES = ("export", "report")

Planned = Mapping[CampaignRun, PlannedRun]


@dataclass(frozen=True, kw_only=True)
class PlannedCampaign:
    """The runs of a campaign, each with its stages.

    Attributes:
        choices: what `auto` came to.
        allow_code: whether its recipes may name code from outside of mgpp.
        selecting: the runs that candidates are chosen by; none where there is no choice.
        final: the runs of the table, of the first candidates as long as none are chosen.
    """

    choices: Choices
    allow_code: bool
    selecting: Planned
    final: Planned


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run stands.

    Attributes:
        title: of the run.
        state: "done", "running", "failed" or "waiting".
        note: its metric, who works on what stage, why it failed, or what it waits for.
        progress: the newest record of a running stage.
    """

    title: str
    state: str
    note: str
    progress: dict[str, Any] | None = None


def first_cluster(config: CampaignConfig) -> ClusterConfig:
    """Return the cluster of a campaign's runs: that of the first one.

    Raises:
        ConfigError: if its configuration is wrong.
    """
    run = campaign_runs(config)[0]
    values, problems = read_config(run.recipe, run.overrides)
    sections, more = parse_sections({"cluster": values.get("cluster", {})})
    problems += [problem for problem in more if problem.key.startswith("cluster")]
    if problems:
        raise ConfigError(problem.within(run.title) for problem in problems)
    cluster = sections["cluster"]
    assert isinstance(cluster, ClusterConfig)
    return cluster


def plan_campaign(
    config: CampaignConfig, choices: Choices, *, allow_code: bool = False
) -> PlannedCampaign:
    """Return every run of a campaign with its stages.

    Args:
        config: of the campaign.
        choices: what `auto` comes to; the runs of one recipe have one.
        allow_code: whether its recipes may name code from outside of mgpp.

    Raises:
        ConfigError: with the problems of all runs whose configuration cannot be.
    """
    selecting, final = selection_runs(config), campaign_runs(config)
    planned = _plan(config, choices, allow_code, [*selecting, *final])
    return PlannedCampaign(
        choices=choices,
        allow_code=allow_code,
        selecting={run: planned[run] for run in selecting},
        final={run: planned[run] for run in final},
    )


def run_campaign(
    config: CampaignConfig,
    planned: PlannedCampaign,
    store: ArtifactStore,
    console: Console,
    signals: StopSignals,
) -> Artifact:
    """Choose candidates, run all runs that are not done, write tables and page; the cluster is connected.

    Args:
        config: of the campaign.
        planned: its runs.
        store: where artifacts go.
        console: where progress is printed.
        signals: that end it.

    Returns:
        The artifact with the tables, in which runs of the table that failed are named, too.

    Raises:
        StageError: naming the runs of the selection that failed, once all others are done.
    """
    choice, final = NO_CHOICE, planned.final
    if planned.selecting:
        choice = _select(config, planned.selecting, store, console, signals)
        final = _plan_final(config, planned, choice)
    failures = _run(final, config, store, console, signals)
    outcomes = [
        _outcome(run, p, store, failures.get(run.title, ""), curves=config.curves)
        for run, p in final.items()
    ]
    params = config.model_dump(mode="json", exclude={"storage", "runs_at_once"})
    inputs = {run.title: p.stages[-1].key for run, p in {**planned.selecting, **final}.items()}
    key = make_key("campaign", VERSION, {**params, "failures": failures}, inputs)
    stage = PlannedStage(name="campaign", key=key, params=params, inputs=(), on_all_workers=False)
    return made_once(
        stage,
        store,
        lambda folder: write_campaign(folder, config, outcomes, choice),
        tell=console.print,
        give_up=signals.give_up,
    )


def runs_done(planned: PlannedCampaign, store: ArtifactStore) -> str:
    """Return what a campaign has saved, in words."""
    runs = [*planned.selecting.values(), *planned.final.values()]
    done = sum(all_done(run.stages, store) for run in runs)
    return f"{done} of {len(runs)} runs done, the stages and checkpoints of the others"


def campaign_states(
    config: CampaignConfig, planned: PlannedCampaign, store: ArtifactStore
) -> list[RunState]:
    """Return how each run stands, from the store alone: no matter where the campaign runs."""
    states = [_state(run, p, store) for run, p in planned.selecting.items()]
    final = planned.final
    if any(state.state != "done" for state in states):
        return states + [
            RunState(title=run.title, state="waiting", note="its settings are not chosen yet")
            if run.place.is_pruned
            else _state(run, p, store)
            for run, p in final.items()
        ]
    if states:
        choice = _choice(config, planned.selecting, store)
        final = _plan_final(config, planned, choice)
    return states + [_state(run, p, store) for run, p in final.items()]


def _plan_final(config: CampaignConfig, planned: PlannedCampaign, choice: Choice) -> Planned:
    """Return the runs of the table, now that candidates are chosen."""
    runs = campaign_runs(config, choice.chosen)
    return _plan(config, planned.choices, planned.allow_code, runs, planned.final)


def _plan(
    config: CampaignConfig,
    choices: Choices,
    allow_code: bool,
    runs: Sequence[CampaignRun],
    known: Planned = MappingProxyType({}),
) -> Planned:
    """Return runs with their stages; planning one reads its recipe, so those known are taken over."""
    planned, problems = {}, []
    for run in runs:
        if run in known:
            planned[run] = known[run]
            continue
        whole = config.export and run.place.is_pruned and not run.selecting
        try:
            planned[run] = plan_run(
                run.title,
                run.recipe,
                run.overrides,
                pruned=run.place.is_pruned,
                settle=partial(choices.settle, campaign=config.name),
                allow_code=allow_code,
                without=() if whole else _LAST_STAGES,
            )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return planned


def _run(
    planned: Planned,
    config: CampaignConfig,
    store: ArtifactStore,
    console: Console,
    signals: StopSignals,
) -> dict[str, str]:
    """Run what is not done; return why it failed, by the title of each run that did."""
    runs = {run.title: run for run in planned}
    return run_all(
        list(planned.values()),
        store,
        console,
        at_once=config.runs_at_once,
        signals=signals,
        score=lambda p: _score_text(_outcome(runs[p.title], p, store, "")),
    )


def _select(
    config: CampaignConfig,
    planned: Planned,
    store: ArtifactStore,
    console: Console,
    signals: StopSignals,
) -> Choice:
    """Run the selection and choose."""
    console.print("selection of candidates")
    failed = _run(planned, config, store, console, signals)
    if failed:
        raise StageError(
            f"{len(failed)} of {len(planned)} runs failed, of those that candidates are chosen by; the "
            "same command runs only these again:\n"
            + "\n".join(f"{title}: {reason}" for title, reason in failed.items())
        )
    return _choice(config, planned, store)


def _choice(config: CampaignConfig, planned: Planned, store: ArtifactStore) -> Choice:
    """Return what is chosen, once the selection is done."""
    outcomes = [_outcome(run, p, store, "") for run, p in planned.items()]
    scores = {o.run: o.metrics[o.metric.name] for o in outcomes}
    metrics = {o.run.place.task: o.metric for o in outcomes}
    return Choice(scores=scores, chosen=choose(config, scores, metrics))


def _state(run: CampaignRun, planned: PlannedRun, store: ArtifactStore) -> RunState:
    title, stages = run.title, planned.stages
    missing = [stage for stage in stages if store.find(stage.name, stage.key) is None]
    if not missing:
        outcome = _outcome(run, planned, store, "")
        return RunState(title=title, state="done", note=_score_text(outcome))
    for stage in missing:
        lease = LeaseFolder(store.folder_of(stage.name, stage.key)).newest()
        if lease is not None and lease.is_held:
            note = f"{stage.name}, {lease}"
            return RunState(title=title, state="running", note=note, progress=lease.progress)
    failure = store.failure(stages[-1].name, stages[-1].key)
    if failure is not None:
        return RunState(title=title, state="failed", note=failure)
    return RunState(title=title, state="waiting", note="")


def _outcome(
    run: CampaignRun,
    planned: PlannedRun,
    store: ArtifactStore,
    failure: str,
    *,
    curves: bool = False,
) -> Outcome:
    found = {stage.name: store.find(stage.name, stage.key) for stage in planned.stages}
    artifacts = {name: artifact for name, artifact in found.items() if artifact is not None}
    evaluated, last = artifacts.get("evaluate"), artifacts.get(planned.stages[-1].name)
    label = "pruned" if run.place.is_pruned else "dense"
    scores = evaluated.metrics[label] if evaluated and not failure else {}
    return Outcome(
        run=run,
        metric=_headline(planned),
        metrics={name: math.nan if value is None else value for name, value in scores.items()},
        seconds={name: artifact.seconds for name, artifact in artifacts.items()},
        num_workers=planned.config.cluster.num_workers,
        url=last.url if last else "",
        failure=failure,
        curve=_curve(artifacts.get("prune")) if curves and not failure else None,
    )


def _headline(planned: PlannedRun) -> Metric:
    task = make_task(planned.config.task)
    return task.metric(task.headline)


def _curve(pruned: Artifact | None) -> LossCurve | None:
    """Return how a run's pruning trained; None where it did not, as in one shot."""
    if pruned is None or METRICS_FILE not in pruned.files:
        return None
    return loss_curve(parse_records(pruned.read_text(METRICS_FILE))["step"])


def _score_text(outcome: Outcome) -> str:
    name = outcome.metric.name
    return f"{name} {outcome.metric.text(outcome.metrics[name])}"
