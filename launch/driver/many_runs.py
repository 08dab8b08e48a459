"""Many runs on one cluster: several at a time, shared stages once, one failure stops no other run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from rich.console import Console

from launch.driver.progress import describe
from launch.driver.run import all_done, run_stages
from launch.workers.status_actor import make_status_actor, on_this_node
from pipeline.errors import ConfigError, error_text, may_pass
from pipeline.runs.config import RunConfig, parse_config, read_config
from pipeline.runs.flow import pinned, plan_stages
from pipeline.runs.stage import PlannedStage
from pipeline.runs.upstream import resolve_upstream
from pipeline.store.artifacts import ArtifactStore

_POLL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One of many runs.

    Attributes:
        title: its name in logs and tables.
        config: of the run.
        stages: the stages to run, in order.
    """

    title: str
    config: RunConfig
    stages: list[PlannedStage]


def plan_run(
    title: str,
    recipe: str,
    overrides: Sequence[str],
    *,
    pruned: bool,
    settle: Callable[[RunConfig], RunConfig],
    allow_code: bool,
    without: Sequence[str] = (),
) -> PlannedRun:
    """Return a run that is a recipe with changes.

    Args:
        title: its name in logs and tables.
        recipe: path of its file.
        overrides: `key=value` changes.
        pruned: False for the dense fine-tune and its evaluation alone.
        settle: returns its configuration with what `auto` comes to.
        allow_code: whether it may name code from outside of mgpp.
        without: names of stages that are left out.

    Raises:
        ConfigError: with every problem, the title before each.
    """
    values, problems = read_config(recipe, overrides)
    if not problems:
        values, problems = resolve_upstream(values, allow_code=allow_code)
    if problems:
        raise ConfigError(problem.within(title) for problem in problems)
    try:
        config = settle(parse_config(values, allow_code=allow_code))
    except ConfigError as error:
        raise ConfigError(problem.within(title) for problem in error.problems) from None
    stages = plan_stages(config, pruned=pruned)
    return PlannedRun(
        title=title,
        config=pinned(config),
        stages=[stage for stage in stages if stage.name not in without],
    )


@dataclass(kw_only=True)
class _Job:
    """Stages that run one after the other, once what they need is there."""

    title: str
    config: RunConfig
    stages: list[PlannedStage]
    needs: list["_Job"] = field(default_factory=list)
    is_run: bool = False
    outcome: str | None = None
    """Empty when it is done, else why it failed; None before its end."""


def run_all(
    planned: Sequence[PlannedRun],
    store: ArtifactStore,
    console: Console,
    *,
    at_once: int,
    score: Callable[[PlannedRun], str],
) -> dict[str, str]:
    """Run what is not done; data and dense fine-tunes that runs share come first, each once.

    Args:
        planned: the runs; the cluster must be connected.
        store: where artifacts go.
        console: where progress is printed.
        at_once: how many run at a time.
        score: returns the result of a finished run, in words.

    Returns:
        Why it failed, by the title of each run that did.
    """
    missing = [run for run in planned if not all_done(run.stages, store)]
    done = len(planned) - len(missing)
    console.print(f"{len(planned)} runs, {done} of them cached")
    jobs = _jobs(missing, store)
    runs = {run.title: run for run in missing}
    waiting, running, ended = list(jobs), dict[Any, tuple[_Job, Any]](), 0
    task = ray.remote(num_cpus=0, max_retries=0)(_run_job)
    task = task.options(scheduling_strategy=on_this_node())

    def end(job: _Job, outcome: str) -> None:
        nonlocal ended
        job.outcome = outcome
        if not job.is_run:
            if outcome:
                console.print(f"{job.title}: failed: {outcome}")
            return
        ended += 1
        result = _noted(runs[job.title], outcome, store, score)
        console.print(f"{ended}/{len(missing)} {job.title}: {result}")

    while waiting or running:
        for job in list(waiting):
            broken = next((need for need in job.needs if need.outcome), None)
            if broken is not None:
                waiting.remove(job)
                end(job, f"{broken.title}: {broken.outcome}")
            elif len(running) < at_once and all(need.outcome == "" for need in job.needs):
                waiting.remove(job)
                status = make_status_actor(job.title)
                running[task.remote(job.stages, job.config, store.url, status)] = (job, status)
        ready, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
        for reference in ready:
            job, _ = running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:  # noqa: BLE001  # one that fails must not stop the others
                end(job, _reason(error))
            else:
                end(job, "")
        if not ready:
            for job, status in running.values():
                _show(job, status, console)
    return {job.title: job.outcome for job in jobs if job.is_run and job.outcome}


def _jobs(missing: Sequence[PlannedRun], store: ArtifactStore) -> list[_Job]:
    """Return the jobs of runs: first each data stage, then each dense fine-tune that several share."""
    shared: dict[str, _Job] = {}
    uses: dict[str, int] = {}
    for run in missing:
        for stage in run.stages:
            uses[stage.key] = uses.get(stage.key, 0) + 1
    jobs = []
    for run in missing:
        needs: list[_Job] = []
        for stage in run.stages:
            if stage.name == "data" or (stage.name == "dense" and uses[stage.key] > 1):
                job = shared.get(stage.key)
                if job is None and store.find(stage.name, stage.key) is None:
                    before = [s for s in run.stages if s.name == "data"]
                    job = _Job(
                        title=f"{stage.name} of {run.title}",
                        config=run.config,
                        stages=[stage] if stage.name == "data" else [*before, stage],
                        needs=list(needs),
                    )
                    shared[stage.key] = job
                if job is not None:
                    needs.append(job)
        jobs.append(
            _Job(title=run.title, config=run.config, stages=run.stages, needs=needs, is_run=True)
        )
    return [*shared.values(), *jobs]


def _noted(
    run: PlannedRun, outcome: str, store: ArtifactStore, score: Callable[[PlannedRun], str]
) -> str:
    """Note beside a run's last stage why it failed, if it did; return its result in words.

    What storage raises here must not stop the other runs.
    """
    result = f"failed: {outcome}" if outcome else "done"
    try:
        for stage in run.stages[-1:]:
            store.note_failure(stage.name, stage.key, outcome)
        return result if outcome else score(run)
    except Exception as error:
        if not may_pass(error):
            raise
        return f"{result} ({store.url}: {error_text(error)})"


def _show(job: _Job, status: Any, console: Console) -> None:
    records, _ = ray.get(status.latest.remote())
    for stage, record in list(records.items())[-1:]:
        if record is not None:
            console.print(f"  {job.title}: {stage} {describe(record)}")


def _run_job(stages: list[PlannedStage], config: RunConfig, storage: str, status: Any) -> None:
    """Run stages; a task of its own."""
    run_stages(stages, config, ArtifactStore(storage), status=status)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split())[:500]
