"""Leases on stages: what another run on the same store is doing is waited for, not done twice."""

import _thread
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StageError, error_text, may_pass
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.store.leases import HeldLease, Lease, LeaseFolder, LeaseLostError, LeaseWatch

_POLL_SECONDS = 2.0
_AWAY_SECONDS = 600.0  # how long storage may be away before a run that waits gives up


@contextmanager
def leased(
    stages: Sequence[PlannedStage],
    store: ArtifactStore,
    *,
    progress: Callable[[str], dict[str, Any] | None],
    tell: Callable[[str], None],
    give_up: Callable[[], None] | None = None,
) -> Iterator[list[PlannedStage]]:
    """Hold the leases of the stages that are not done, for as long as the block runs.

    Leases are taken in the stages' order, which is one for all runs, so that none wait for each other.

    Args:
        stages: in order.
        store: where their artifacts go.
        progress: gives the newest record of a stage, for those who watch its lease.
        tell: called with a line that says which run this one waits for.
        give_up: called by a thread where a lease is lost; raises KeyboardInterrupt in the block. What
            Ctrl-C does, unless given.

    Yields:
        The stages that are left to do, all leased.

    Raises:
        StageError: if this run's lease expired and another run took over, or storage is away for long.
    """
    held: list[HeldLease] = []
    lost: list[LeaseLostError] = []

    def stop(error: LeaseLostError) -> None:
        lost.append(error)
        (give_up or _thread.interrupt_main)()

    try:
        missing = []
        for stage in stages:
            number = _take(stage, store, tell)
            if number is None:
                continue
            missing.append(stage)
            held.append(
                HeldLease(
                    LeaseFolder(store.folder_of(stage.name, stage.key)),
                    number,
                    on_lost=stop,
                    progress=lambda name=stage.name: progress(name),  # type: ignore[misc]
                )
            )
        yield missing
    except KeyboardInterrupt:
        if lost:
            raise StageError(
                f"{lost[0]}: this run's lease expired (no heartbeat for 60 s); rerun the same command "
                "to wait for the other run or resume where it stops"
            ) from None
        raise
    finally:
        for lease in held:
            lease.give_back()


def made_once(
    stage: PlannedStage,
    store: ArtifactStore,
    make: Callable[[Path], dict[str, Any]],
    *,
    tell: Callable[[str], None],
    give_up: Callable[[], None] | None = None,
) -> Artifact:
    """Return a stage's artifact, made here and now unless another run has made it or is making it.

    Args:
        stage: which one.
        store: where its artifact goes.
        make: writes into a folder and returns the metrics.
        tell: called with a line that says which run this one waits for.
        give_up: as of `leased`.

    Raises:
        StageError: if this run's lease expired and another run took over.
    """
    with leased([stage], store, progress=lambda _: None, tell=tell, give_up=give_up) as missing:
        if missing:
            started = time.monotonic()
            attempt = store.begin(stage.name, stage.key, stage.params, {})
            return attempt.commit(make(attempt.folder), time.monotonic() - started)
    found = store.find(stage.name, stage.key)
    assert found is not None
    return found


def _take(stage: PlannedStage, store: ArtifactStore, tell: Callable[[str], None]) -> int | None:
    """Wait until a stage is done (None) or its lease is this run's (its number).

    Raises:
        StageError: if storage cannot be reached for ten minutes.
    """
    watch = LeaseWatch(store.folder_of(stage.name, stage.key))
    holder = None
    away_since: float | None = None
    while True:
        try:
            taken = _try(stage, store, watch)
        except Exception as error:
            if not may_pass(error):
                raise
            if away_since is None:
                away_since = time.monotonic()
                tell(f"{stage.name:<9} waiting for {store.url}: {error_text(error)}")
            if time.monotonic() - away_since > _AWAY_SECONDS:
                raise StageError(
                    f"{store.url} could not be reached for {_AWAY_SECONDS:.0f} s: {error_text(error)}; "
                    "what was finished before is good: rerun the same command when it can"
                ) from error
        else:
            away_since = None
            if not isinstance(taken, Lease):
                return taken
            if str(taken) != holder:
                holder = str(taken)
                tell(f"{stage.name:<9} waiting for {holder}, which is working on it")
        time.sleep(_POLL_SECONDS)


def _try(stage: PlannedStage, store: ArtifactStore, watch: LeaseWatch) -> int | Lease | None:
    """Return None if a stage is done, the number of its lease if that is this run's, or who has it."""
    if store.find(stage.name, stage.key) is not None:
        return None
    taken = watch.take()
    if isinstance(taken, Lease) or store.find(stage.name, stage.key) is None:
        return taken
    watch.folder.give_back(taken)  # done in the meantime
    return None
