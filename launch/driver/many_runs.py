"""Many runs on one cluster: several at a time, shared stages once, one failure stops no other run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from rich.console import Console

from launch.driver.progress import describe
from launch.driver.run import all_done, run_stages
from launch.driver.stopping import StopSignals
from launch.workers.status_actor import asked_to_stop, make_status_actor, on_this_node
from pipeline.errors import ConfigError, RunStoppedError, error_text, may_pass
from pipeline.runs.config import RunConfig, parse_config, read_config
from pipeline.runs.flow import pinned, plan_stages
from pipeline.runs.stage import PlannedStage
from pipeline.runs.upstream import resolve_upstream
from pipeline.store.artifacts import ArtifactStore

_POLL_SECONDS = 1.0
_SHOW_SECONDS = 10.0


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
    signals: StopSignals,
    score: Callable[[PlannedRun], str],
) -> dict[str, str]:
    """Run what is not done; data and dense fine-tunes that runs share come first, each once.

    Args:
        planned: the runs; the cluster must be connected.
        store: where artifacts go.
        console: where progress is printed.
        at_once: how many run at a time.
        signals: that end it; steps under way are kept.
        score: returns the result of a finished run, in words.

    Returns:
        Why it failed, by the title of each run that did.
    """
    missing = [run for run in planned if not all_done(run.stages, store)]
    done = len(planned) - len(missing)
    console.print(f"{len(planned)} runs, {done} of them cached")
    jobs = _jobs(missing, store)
    work = _Work(jobs, missing, store, console, score)
    grace = max((run.config.cluster.stop_grace_s for run in missing), default=0)
    with signals.patient(work.stop, grace, console.print):
        work.run(at_once)
    return {job.title: job.outcome for job in jobs if job.is_run and job.outcome}


class _Work:
    """Jobs at work on the cluster, until they end or are to stop."""

    def __init__(
        self,
        jobs: Sequence[_Job],
        missing: Sequence[PlannedRun],
        store: ArtifactStore,
        console: Console,
        score: Callable[[PlannedRun], str],
    ) -> None:
        self._waiting = list(jobs)
        self._running: dict[Any, tuple[_Job, Any]] = {}
        self._runs = {run.title: run for run in missing}
        self._store, self._console, self._score = store, console, score
        self._num_ended = 0
        self._starts_more = True
        self._saving: list[Any] | None = (
            None  # status actors of those whose steps are kept, once known
        )
        task = ray.remote(num_cpus=0, max_retries=0)(_run_job)
        self._task = task.options(scheduling_strategy=on_this_node())

    def run(self, at_once: int) -> None:
        """Start jobs as what they need is done, and await them."""
        shown = time.monotonic()
        while self._waiting or self._running:
            self._start(at_once)
            ready, _ = ray.wait(list(self._running), timeout=_POLL_SECONDS)
            for reference in ready:
                self._end_one(reference)
            if self._saving is not None and not self._is_saving(self._saving):
                return
            if not ready and time.monotonic() - shown > _SHOW_SECONDS:
                shown = time.monotonic()
                for job, status in self._running.values():
                    _show(job, status, self._console)

    def stop(self) -> bool:
        """Start no more, and ask what is at steps to save them; return whether any is."""
        self._starts_more = False
        self._saving = asked_to_stop([status for _, status in list(self._running.values())])
        return bool(self._saving)

    def _is_saving(self, saving: Sequence[Any]) -> bool:
        return any(status is one for _, status in self._running.values() for one in saving)

    def _start(self, at_once: int) -> None:
        for job in list(self._waiting):
            if not self._starts_more:
                return
            broken = next((need for need in job.needs if need.outcome), None)
            if broken is not None:
                self._waiting.remove(job)
                self._end(job, f"{broken.title}: {broken.outcome}")
            elif len(self._running) < at_once and all(need.outcome == "" for need in job.needs):
                self._waiting.remove(job)
                status = make_status_actor(job.title)
                started = self._task.remote(job.stages, job.config, self._store.url, status)
                self._running[started] = (job, status)

    def _end_one(self, reference: Any) -> None:
        job, _ = self._running.pop(reference)
        try:
            ray.get(reference)
        except Exception as error:  # noqa: BLE001  # one that fails must not stop the others
            if isinstance(getattr(error, "cause", error), RunStoppedError):
                self._console.print(f"{job.title}: stopped: {_reason(error)}")
            else:
                self._end(job, _reason(error))
        else:
            self._end(job, "")

    def _end(self, job: _Job, outcome: str) -> None:
        job.outcome = outcome
        if not job.is_run:
            if outcome:
                self._console.print(f"{job.title}: failed: {outcome}")
            return
        self._num_ended += 1
        result = _noted(self._runs[job.title], outcome, self._store, self._score)
        self._console.print(f"{self._num_ended}/{len(self._runs)} {job.title}: {result}")


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
