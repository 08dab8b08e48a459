"""What happens when a run is told to stop: leases are given back, and it is said what was saved."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer

from launch.cli.output import Terminated
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.checkpoints import newest_step


@contextmanager
def told_when_stopped(stages: Sequence[PlannedStage], store: ArtifactStore) -> Iterator[None]:
    """Turn SIGTERM into an exception while the block runs; say then what the next run goes on from."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough, and the way out is short
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"stopped: {last_saved(stages, store)}; the same command goes on from there", err=True
        )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def last_saved(stages: Sequence[PlannedStage], store: ArtifactStore) -> str:
    """Return, for people, what of a run is safe."""
    done = [stage for stage in stages if store.find(stage.name, stage.key) is not None]
    missing = next((stage for stage in stages if stage not in done), None)
    if missing is None:
        return "all is done"
    saved = ", ".join(stage.name for stage in done) or "no stage"
    step = newest_step(f"{store.folder_of(missing.name, missing.key)}/checkpoints")
    if step is None:
        return f"{saved} done, no checkpoint of {missing.name}"
    return f"{saved} done, {missing.name} saved at step {step}"
