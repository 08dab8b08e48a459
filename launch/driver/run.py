"""A whole run on Ray: stage after stage, each only if its output is not there already."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import ray
from rich.console import Console

from launch.cluster.code_folder import use_code_folder
from launch.cluster.connect import free_cores
from launch.driver.locking import leased
from launch.driver.progress import StageDisplay
from launch.driver.stopping import StopSignals
from launch.workers.devices import use_devices
from launch.workers.prefetch import clear_nodes
from launch.workers.status_actor import WITH_STEPS, Posted, asked_to_stop, make_status_actor
from launch.workers.storage import store_on_this_node
from launch.workers.worker_group import run_on_workers
from pipeline.errors import ConfigError, StageError
from pipeline.runs.config import RunConfig
from pipeline.runs.flow import STAGES, run_stage, stage_of
from pipeline.runs.stage import PlannedStage, model_sizes
from pipeline.runs.stages.export import EXPORT, compressed_sizes, embedding_sizes, onnx_sizes
from pipeline.runs.validate import check_schedule
from pipeline.storage.node_copies import DamagedArtifactError
from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.store.checkpoint_manifest import newest_step, num_parts


@dataclass(kw_only=True)
class RunResult:
    """What a run made.

    Attributes:
        artifacts: by stage.
        seconds: wall seconds of each stage now (0 if it was cached).
        cached: the stages whose output was in the store already.
    """

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)

    def withdraw(self, stage: str) -> None:
        """Forget what a stage made: it is made again."""
        self.artifacts.pop(stage, None)
        self.seconds.pop(stage, None)
        self.cached = [name for name in self.cached if name != stage]

    def summary(self) -> dict[str, Any]:
        """Return the outcome for other tools."""
        exported = self.artifacts["export"]
        folder = EXPORT.compared["packed model"]
        packed = {"packed": f"{exported.url}/{folder}"} if exported.weight_bytes(folder) else {}
        onnx = {"onnx": f"{exported.url}/{EXPORT.onnx}"} if onnx_sizes(exported.metrics) else {}
        return {
            "status": "done",
            "sparsity": exported.metrics["sparsity"],
            "model_sparsity": exported.metrics["model_sparsity"],
            "left_out": exported.metrics["left_out"],
            "warnings": [
                warning
                for name in ("prune", "export")
                for warning in self.artifacts[name].metrics.get("warnings", [])
            ],
            "metrics": self.artifacts["evaluate"].metrics,
            "artifacts": {name: artifact.url for name, artifact in self.artifacts.items()},
            "model": f"{exported.url}/model",
            **packed,
            **({"bench": exported.metrics["bench"]} if "bench" in exported.metrics else {}),
            **onnx,
            "report": f"{self.artifacts['report'].url}/report.html",
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "cached": self.cached,
            "bytes": model_sizes(STAGES, self.artifacts) | onnx_sizes(exported.metrics),
            "compressed_bytes": compressed_sizes(exported.metrics),
            "embedding_bytes": embedding_sizes(exported.metrics),
        }


def all_done(stages: list[PlannedStage], store: ArtifactStore) -> bool:
    """Return whether the output of every stage is in the store."""
    return all(store.find(stage.name, stage.key) is not None for stage in stages)


def last_saved(stages: Sequence[PlannedStage], store: ArtifactStore) -> str:
    """Return what a run has saved, in words."""
    done = [stage for stage in stages if store.find(stage.name, stage.key) is not None]
    missing = next((stage for stage in stages if stage not in done), None)
    if missing is None:
        return "all stages"
    saved = ", ".join(stage.name for stage in done) or "no stage"
    if missing.name not in WITH_STEPS:
        return f"{saved} done"
    checkpoints = f"{store.folder_of(missing.name, missing.key)}/checkpoints"
    step = newest_step(checkpoints)
    if step is not None:
        return f"{saved} done, {missing.name} saved at step {step}"
    layers = num_parts(checkpoints)
    if layers:
        return f"{saved} done, {layers} layers of {missing.name} saved"
    return f"{saved} done, no checkpoint of {missing.name}"


@contextmanager
def nodes_cleared(store: ArtifactStore) -> Iterator[None]:
    """Delete copies of artifacts from the nodes of the cluster when the block ends."""
    try:
        yield
    finally:
        if not store.is_local:
            clear_nodes()


@dataclass(kw_only=True)
class _Run:
    """One run at work: what its functions share.

    Attributes:
        config: of the run.
        store: where artifacts go.
        status: the actor that progress is posted to, made when it is needed.
        result: what it made so far.
        console: where its stages are shown; None shows nothing.
        here: whether what needs no worker group is run in this process.
        signals: that end it; None where another process gets them.
    """

    config: RunConfig
    store: ArtifactStore
    status: Any
    result: RunResult = field(default_factory=RunResult)
    console: Console | None = None
    here: bool = False
    signals: StopSignals | None = None

    def tell(self, text: str) -> None:
        """Show a line."""
        if self.console:
            self.console.print(text)


def run_stages(
    stages: list[PlannedStage],
    config: RunConfig,
    store: ArtifactStore,
    console: Console | None = None,
    status: Any = None,
    *,
    here: bool = False,
    signals: StopSignals | None = None,
) -> RunResult:
    """Run all stages that are not done; the cluster must be connected unless none is left.

    Args:
        stages: in order.
        config: of the run.
        store: where artifacts go.
        console: where to show the stages as they run; None shows nothing.
        status: the actor that progress is posted to; one is made unless given.
        here: run what needs no worker group in this process, which has imported what it takes; for a
            cluster that is this machine. Otherwise a task of the cluster does.
        signals: that this process gets; None where another one gets them, and asks the status actor.

    Raises:
        ConfigError: if the data shows that the configuration cannot run.
        StageError: if a stage fails for a reason its user can act on; if an input is not what was
            committed, and is another run's. (One of this run is made again.)
        RunStoppedError: if it ended as it was asked to.
    """
    again = set[str]()
    run = _Run(
        config=config,
        store=store,
        status=status,
        console=console,
        here=here,
        signals=signals,
    )
    while True:
        try:
            _run_through(run, stages)
        except DamagedArtifactError as error:
            made_by = _made_by(error.url, stages, store)
            if made_by is None or made_by in again:
                raise StageError(str(error)) from error
            again.add(made_by)
            store.condemn(error.url, error.problems)
            run.result.withdraw(made_by)
        else:
            artifacts = run.result.artifacts
            run.result.artifacts = {stage.name: artifacts[stage.name] for stage in stages}
            return run.result


def _made_by(url: str, stages: list[PlannedStage], store: ArtifactStore) -> str | None:
    """Return which stage of the run made an artifact; None if it is another run's."""
    folder = url.rpartition("/")[0]
    return next((s.name for s in stages if store.folder_of(s.name, s.key) == folder), None)


def _run_through(run: _Run, stages: list[PlannedStage]) -> None:
    """Run all stages that are not done, and note in the result what came of them.

    Raises:
        DamagedArtifactError: if an input is not what was committed.
    """
    artifacts, waiting = run.result.artifacts, list(stages)
    while waiting:
        group = _next_group(waiting)
        waiting = waiting[len(group) :]
        for stage in group:
            _note_found(run, stage)
        missing = [stage for stage in group if stage.name not in artifacts]
        if missing:
            run.status = run.status or make_status_actor(run.config.name)
            run.result.seconds |= _run_missing(run, missing)
        for stage in missing:
            artifact = run.store.find(stage.name, stage.key)
            if artifact is None:
                raise StageError(f"stage {stage.name} ended without an artifact")
            artifacts[stage.name] = artifact
        if group[0].name == "data":
            check_schedule(run.config, artifacts["data"].metrics["num_rows"]["train"])


def _note_found(run: _Run, stage: PlannedStage) -> None:
    """Note a stage's output, if it is there, and tell whether it is, or why it is made again."""
    artifact = run.store.find(stage.name, stage.key)
    if artifact is None:
        damage = run.store.damage(stage.name, stage.key)
        if damage:
            run.tell(f"{stage.name:<9} made again: {damage}")
        return
    run.result.artifacts[stage.name] = artifact
    if stage.name in run.result.seconds:
        return  # made by this run, or reported already
    run.result.seconds[stage.name] = 0.0
    run.result.cached.append(stage.name)
    run.tell(f"{stage.name:<9} cached")


def _next_group(stages: list[PlannedStage]) -> list[PlannedStage]:
    """Return the stages at the front that run together: all in a row that need a worker group, or one."""
    return list(takewhile(lambda stage: stage.on_all_workers, stages)) or stages[:1]


def _run_missing(run: _Run, stages: list[PlannedStage]) -> dict[str, float]:
    """Run the stages that no other run is doing; return the wall seconds of each, if shown."""

    def progress(stage: str) -> dict[str, Any] | None:
        posted: Posted = ray.get(run.status.latest.remote())
        return posted[0].get(stage)

    give_up = run.signals.give_up if run.signals else None
    with leased(stages, run.store, progress=progress, tell=run.tell, give_up=give_up) as left:
        done_elsewhere = [stage for stage in stages if stage not in left]
        for stage in done_elsewhere:
            artifact = run.store.find(stage.name, stage.key)
            assert artifact is not None
            run.result.artifacts[stage.name] = artifact
        seconds = {stage.name: 0.0 for stage in done_elsewhere}
        if left and run.console:
            seconds |= _run_shown(run, left, run.console)
        elif left:
            _run_group(run, left)
        return seconds


def _run_shown(run: _Run, stages: list[PlannedStage], console: Console) -> dict[str, float]:
    """Run stages together; return the wall seconds of each; a worker group's start is in its first."""
    names = [stage.name for stage in stages]
    _, earlier = ray.get(run.status.latest.remote())

    def latest() -> Posted:
        records, notes = ray.get(run.status.latest.remote())
        return records, notes[len(earlier) :]

    with StageDisplay(names, console, latest) as display:
        _run_group(run, stages)
    return display.seconds


def _run_group(run: _Run, stages: list[PlannedStage]) -> None:
    """Run stages together: those of a worker group on it, another here or as a task."""
    config, artifacts, status = run.config, run.result.artifacts, run.status
    if stages[0].on_all_workers:
        with _steps_kept(run):
            run_on_workers(stages, config, run.store, artifacts, status)
        return
    (stage,) = stages
    inputs = {name: artifacts[name] for name in stage.inputs}
    wanted = stage_of(stage, config).num_cpus(config)
    cores = wanted if isinstance(wanted, int) else free_cores()
    if run.here:
        with _without_bars():
            _run_alone(stage, config, run.store.url, inputs, status, cores)
        return
    memory = _memory(stage, config, inputs)
    task = ray.remote(num_cpus=cores, max_retries=1, memory=memory)(_run_alone)
    try:
        ray.get(task.remote(stage, config, run.store.url, inputs, status, cores))
    except (ConfigError, StageError) as error:
        # Ray raises its own kind of it, whose text is the task's traceback.
        raise getattr(error, "cause", error) from error


def _steps_kept(run: _Run) -> AbstractContextManager[None]:
    """Have a worker group keep its steps before a signal ends the run."""
    if run.signals is None:
        return nullcontext()
    grace = run.config.cluster.stop_grace_s
    return run.signals.patient(
        lambda: asked_to_stop([run.status]) != [],
        grace,
        lambda text: run.status.post.remote({"event": "note", "text": text}),
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' own bars, several a run, from between the run's lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _memory(planned: PlannedStage, config: RunConfig, inputs: dict[str, Artifact]) -> int:
    """Return the memory that a stage's task asks Ray for, bytes.

    Never more than the largest node has: then it runs alone there, and does not wait for ever.
    """
    stage = next(stage for stage in STAGES if stage.name == planned.name)
    nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    return min(stage.memory(config, inputs), int(max(nodes, default=0)))


def _run_alone(
    stage: PlannedStage,
    config: RunConfig,
    storage: str,
    inputs: dict[str, Artifact],
    status: Any,
    cores: int,
) -> None:
    """Run a stage that needs no worker group, on CPUs."""
    use_devices(0)
    use_code_folder()
    status.post.remote({"event": "begin", "stage": stage.name})
    run_stage(
        stage,
        config,
        store_on_this_node(storage),
        inputs,
        workers=None,
        progress=status.post.remote,
        cores=cores,
    )
