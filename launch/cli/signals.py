"""Stopping a run: its leases are released, and what was saved is printed."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer

from launch.cli.output import Terminated
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.checkpoint_manifest import newest_step


@contextmanager
def announced_stop(stages: Sequence[PlannedStage], store: ArtifactStore) -> Iterator[None]:
    """Turn SIGTERM into an exception while the block runs; print then where the next run resumes."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough, and the way out is short
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"stopped: {last_saved(stages, store)}; rerun the same command to resume from there",
            err=True,
        )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def last_saved(stages: Sequence[PlannedStage], store: ArtifactStore) -> str:
    """Return what a run has saved, in words."""
    done = [stage for stage in stages if store.find(stage.name, stage.key) is not None]
    missing = next((stage for stage in stages if stage not in done), None)
    if missing is None:
        return "all is done"
    saved = ", ".join(stage.name for stage in done) or "no stage"
    step = newest_step(f"{store.folder_of(missing.name, missing.key)}/checkpoints")
    if step is None:
        return f"{saved} done, no checkpoint of {missing.name}"
    return f"{saved} done, {missing.name} saved at step {step}"
