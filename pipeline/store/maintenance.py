"""What lies in an artifact store: listed, and cleared of garbage and of what is damaged."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pipeline.errors import ConfigError, Problem
from pipeline.storage.filesystems import (
    absolute_url,
    open_storage,
    storage_error_text,
    storage_problems,
)
from pipeline.storage.records import DamagedRecordError, FailureNote, HardwareChoice, read_record
from pipeline.store.artifacts import DONE_FILE, FAILED_FILE, Artifact, ArtifactStore
from pipeline.store.checkpoint_manifest import read_checkpoint
from pipeline.store.leases import HeldLease, Lease, LeaseFolder, LeaseLostError, LeaseWatch
from pipeline.store.parts import PARTS, abandoned_parts, discard_parts

_KEY_FOLDER = re.compile(r"(?P<stage>[a-z][a-z_]*)-(?P<key>[0-9a-f]{16})")
_CHECKPOINTS = "checkpoints"
_CHOICES, _RAY = "auto", "ray"
# What of a key's folder is ours, by path in it: all else is left alone.
_OURS = re.compile(
    r"(?P<file>(_DONE|_FAILED|_LEASE\.[0-9]+)\.json(\.[0-9a-f]{8}\.tmp)?)"
    r"|(?P<attempt>a-[0-9a-f]{12})(/.*)?"
    r"|(?P<checkpoint>checkpoints/([^/]+/)?step-[0-9]{8}-[0-9a-f]{6})/.*"
    r"|(?P<parts>parts)(/.*)?"
    r"|(?P<ray>ray)/.*",  # the record of Ray Train while it is at work
    re.DOTALL,
)
_ATTEMPT = re.compile("a-[0-9a-f]{12}")
_POLL_SECONDS = 2.0
_Found = TypeVar("_Found")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key of a store.

    Attributes:
        stage: the stage's name.
        key: hexadecimal name of all that went into it.
        url: the key's folder.
        artifact: what is done; None while it is not, or where it is damaged.
        lease: who works on it, or did; None if nobody.
        can_resume: whether a run can resume from a checkpoint here.
        files: bytes and time of writing (UTC) of each file of ours, by path relative to the folder.
        damage: what is wrong with files that are not what was written, by path relative to the folder.
    """

    stage: str
    key: str
    url: str
    artifact: Artifact | None
    lease: Lease | None
    can_resume: bool
    files: dict[str, tuple[int, datetime]]
    damage: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """Whether it is `done`, `running`, `damaged` (what was done is) or `unfinished`."""
        if self.artifact is not None:
            return "done"
        if self.is_held:
            return "running"
        return "damaged" if DONE_FILE in self.files else "unfinished"

    @property
    def damage_texts(self) -> list[str]:
        """A line for each file that is not what was written."""
        return [f"{self.url}/{name} {why}" for name, why in self.damage.items()]

    @property
    def checkpoints(self) -> list[str]:
        """The complete checkpoints, damaged ones among them, by path relative to the folder."""
        return [_unit(name) for name in self.files if _is_checkpoint_manifest(name)]

    @property
    def is_held(self) -> bool:
        """Whether someone works on it, as far as this machine can know."""
        return self.lease is not None and self.lease.is_held

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(size for size, _ in self.files.values())

    @property
    def changed(self) -> datetime:
        """When a file was written last (UTC)."""
        return max(when for _, when in self.files.values())


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A file or folder that nobody needs.

    Attributes:
        url: a file or folder.
        size: its bytes.
        why: the reason, in words.
    """

    url: str
    size: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What of unfinished work is garbage.

    Attributes:
        older_than_days: what was untouched for so long.
        checkpoints: whether checkpoints of that age are, too, from which a run could resume.
    """

    older_than_days: float = 7.0
    checkpoints: bool = False


def usable_store(storage: str) -> ArtifactStore:
    """Return the store of a run's `storage`, to which files can be written.

    Raises:
        ConfigError: if it cannot be used.
    """
    problems = storage_problems(storage)
    if problems:
        raise ConfigError(problems)
    return ArtifactStore(absolute_url(storage))


def readable_store(storage: str) -> ArtifactStore:
    """Return the store of a run's `storage`, whose server answers; there may be nothing in it yet.

    Raises:
        ConfigError: if it cannot be read.
    """
    url = absolute_url(storage)
    with _read_errors(storage, url):
        store = ArtifactStore(url)
        filesystem, root = open_storage(store.url)
        if not store.is_local:  # a folder is tried before something is written to it
            with suppress(FileNotFoundError):
                filesystem.info(root)
    return store


def existing_store(storage: str) -> ArtifactStore:
    """Return the store of a run's `storage`, in which there must be something.

    Raises:
        ConfigError: if there is nothing, or it cannot be read.
    """
    url = absolute_url(storage)
    with _read_errors(storage, url):
        store = ArtifactStore(url)
        filesystem, root = open_storage(store.url)
        if not filesystem.exists(root):
            raise ConfigError([Problem("storage", f"there is no store at {url}", got=storage)])
        if not filesystem.isdir(root):
            raise ConfigError([Problem("storage", f"{url} is not a folder", got=storage)])
        filesystem.ls(root, detail=False)
    return store


@contextmanager
def _read_errors(storage: str, url: str) -> Iterator[None]:
    """Turn what a storage library raises into one clear error."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        why = f"{url} cannot be read: {storage_error_text(error)}"
        raise ConfigError([Problem("storage", why, got=storage)]) from error


def entries(store: ArtifactStore) -> Iterator[Entry]:
    """Yield what is in a store, by name; a folder that holds nothing of ours is not in it."""
    filesystem, root = open_storage(store.url)
    if not filesystem.exists(root):
        return
    for path in sorted(str(p).rstrip("/") for p in filesystem.ls(root, detail=False)):
        named = _KEY_FOLDER.fullmatch(path.rpartition("/")[2])
        entry = named and _entry(store, named["stage"], named["key"])
        if entry:
            yield entry


def damaged_choices(store: ArtifactStore) -> list[DamagedRecordError]:
    """Return the files of what `auto` came to that are not what was written."""
    filesystem, root = open_storage(f"{store.url.rstrip('/')}/{_CHOICES}")
    if not filesystem.exists(root):
        return []
    found = []
    for path in sorted(str(p) for p in filesystem.ls(root, detail=False)):
        if re.fullmatch(r"[0-9a-f]{16}\.json", path.rpartition("/")[2]):
            try:
                read_record(filesystem, path, HardwareChoice)
            except DamagedRecordError as error:
                found.append(error)
    return found


def clear(
    store: ArtifactStore,
    limits: Limits,
    *,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Garbage]:
    """Delete what nobody needs, each key's under its lease, so that no run begins meanwhile.

    Args:
        store: what to clear.
        limits: what of unfinished work is garbage.
        dry_run: only yield what would be deleted.
        tell: called with a line that says what is waited for.

    Yields:
        What was deleted.
    """
    found = (entry for entry in entries(store) if garbage(entry, limits))
    for entry, watch in _free(found, tell):
        if dry_run:
            yield from garbage(entry, limits)
            continue
        with _held(store, entry, watch) as (now, lost):
            for item in garbage(now, limits) if now else []:
                if not lost:
                    store.discard(item.url)
                    yield item
            if not lost:
                _remove_empty_folders(store, entry)
    for folder, size, why in abandoned_parts(store, older_than_days=limits.older_than_days):
        if not dry_run:
            discard_parts(folder)
        yield Garbage(url=str(folder), size=size, why=why)


def discard_damaged(
    store: ArtifactStore, damaged: Iterable[Entry], tell: Callable[[str], None]
) -> Iterator[Entry]:
    """Delete what is damaged of entries: an artifact with its manifest, a checkpoint, a lease, a note.

    Args:
        store: of the entries.
        damaged: entries with `damage`.
        tell: called with a line that says what is waited for.

    Yields:
        The entries of which it was deleted: those that nobody works on.
    """
    for entry, watch in _free(damaged, tell):
        with _held(store, entry, watch) as (now, _):
            if now is None:
                continue
            units = {_unit(name) for name in entry.damage}
            if DONE_FILE in units or any(_ATTEMPT.fullmatch(unit) for unit in units):
                units |= {unit for unit in map(_unit, now.files) if _ATTEMPT.fullmatch(unit)}
                store.discard(f"{entry.url}/{DONE_FILE}")  # first: what it names must be there
            for unit in units:
                store.discard(f"{entry.url}/{unit}")
            yield entry


def garbage(entry: Entry, limits: Limits) -> list[Garbage]:
    """Return what can be deleted of an entry, if nobody works on it.

    That is abandoned attempts, checkpoints and leases of finished work, and what is unfinished and
    untouched for a time, parts of data among it, but for checkpoints that a run can resume from. Where
    the manifest or what it names is damaged, all is kept: `discard_damaged` deletes it.
    """
    age = (datetime.now(UTC) - entry.changed).total_seconds() / 86400
    resumes = entry.can_resume and not limits.checkpoints
    needed = {DONE_FILE}
    if entry.artifact is not None:
        needed.add(entry.artifact.url.rpartition("/")[2])
        why = "left over from finished work"
    elif DONE_FILE in entry.files:
        return []
    elif age > limits.older_than_days and not resumes:
        why = f"unfinished and untouched for {age:.0f} days"
    else:
        needed |= {_CHECKPOINTS, PARTS, FAILED_FILE}
        why = "an abandoned attempt"
    sizes: dict[str, int] = {}
    for name, (size, _) in entry.files.items():
        if name.partition("/")[0] not in needed:
            sizes[_unit(name)] = sizes.get(_unit(name), 0) + size
    return [Garbage(url=f"{entry.url}/{name}", size=size, why=why) for name, size in sizes.items()]


def _entry(store: ArtifactStore, stage: str, key: str) -> Entry | None:
    """Return what is under a key; None where nothing of it is ours."""
    url = store.folder_of(stage, key)
    filesystem, root = open_storage(url)
    files = {n: info for n, info in _files(filesystem, root).items() if _OURS.fullmatch(n)}
    if not any(_unit(name) != _RAY for name in files):
        return None
    damage: dict[str, str] = {}

    def read(name: str, reader: Callable[[], _Found]) -> _Found | None:
        try:
            return reader() if name in files else None
        except DamagedRecordError as error:
            damage[name] = f"is damaged: {error.reason}"
        except OSError as error:
            damage[name] = f"cannot be read: {storage_error_text(error)}"
        return None

    artifact = read(DONE_FILE, partial(store.read, f"{url}/{DONE_FILE}"))
    if artifact is not None and (why := store.damage(stage, key)):
        damage[artifact.url.rpartition("/")[2]] = f"is damaged: {why}"
        artifact = None
    read(FAILED_FILE, partial(read_record, filesystem, f"{root}/{FAILED_FILE}", FailureNote))
    lease = LeaseFolder(url).newest()
    if lease is not None and lease.damage is not None:
        damage[lease.damage.url.rpartition("/")[2]] = f"is damaged: {lease.damage.reason}"
    complete = [name for name in files if _is_checkpoint_manifest(name)]
    checkpoints = [read(n, partial(read_checkpoint, filesystem, f"{root}/{n}")) for n in complete]
    return Entry(
        stage=stage,
        key=key,
        url=url,
        artifact=artifact,
        lease=lease,
        can_resume=any(checkpoints),
        files=files,
        damage=damage,
    )


def _free(
    found: Iterable[Entry], tell: Callable[[str], None]
) -> Iterator[tuple[Entry, LeaseWatch]]:
    """Yield the entries that nobody works on.

    Whether a process of another machine still does shows in its lease, which it renews: those that may be
    dead are watched for a minute, together.
    """
    watched = []
    for entry in found:
        watch = LeaseWatch(entry.url)
        lease = watch.holding()
        if lease is None:
            yield entry, watch
        elif lease.may_be_dead:
            watched.append((entry, watch, lease))
    if watched:
        tell(f"watching for a minute whether leases of other machines are renewed: {len(watched)}")
    while watched:
        time.sleep(_POLL_SECONDS)
        for entry, watch, first in list(watched):
            lease = watch.holding()
            if lease is None:
                yield entry, watch
            if lease is None or lease.renewed != first.renewed:
                watched.remove((entry, watch, first))


@contextmanager
def _held(
    store: ArtifactStore, entry: Entry, watch: LeaseWatch
) -> Iterator[tuple[Entry | None, list[LeaseLostError]]]:
    """Hold an entry's lease.

    Yields:
        The entry as it is then, without the lease, or None if a run was faster; and a list that is not
        empty once the lease is lost.
    """
    number, lost = watch.take(), list[LeaseLostError]()
    if isinstance(number, Lease):
        yield None, [LeaseLostError(f"{entry.url}: a run was faster")]
        return
    held = HeldLease(watch.folder, number, on_lost=lost.append)
    try:
        now = _entry(store, entry.stage, entry.key)
        own = watch.folder.name_of(number)
        files = {name: info for name, info in now.files.items() if name != own} if now else {}
        yield replace(now, files=files) if now and files else None, lost
    finally:
        held.give_back()


def _unit(name: str) -> str:
    """Return what a file is deleted with: its attempt, its checkpoint, or itself."""
    found = _OURS.fullmatch(name)
    assert found is not None
    return found["attempt"] or found["checkpoint"] or found["parts"] or found["ray"] or name


def _is_checkpoint_manifest(name: str) -> bool:
    found = _OURS.fullmatch(name)
    return found is not None and name == f"{found['checkpoint']}/{DONE_FILE}"


def _remove_empty_folders(store: ArtifactStore, entry: Entry) -> None:
    """Remove the folders that held checkpoints; an object store has none."""
    if store.is_local:
        folder = Path(entry.url) / _CHECKPOINTS
        for path in [*folder.glob("*"), folder]:
            with suppress(OSError):  # something is in it, or it is no folder
                path.rmdir()


def _files(filesystem: fsspec.AbstractFileSystem, folder: str) -> dict[str, tuple[int, datetime]]:
    found = filesystem.find(folder, detail=True)
    return {
        str(path)[len(folder) + 1 :]: (int(info["size"]), _written(info))
        for path, info in found.items()
    }


def _written(info: dict[str, Any]) -> datetime:
    """Return a file's time of writing, which each storage names its own way."""
    for name in ("mtime", "LastModified", "updated", "last_modified", "created"):
        value = info.get(name)
        if isinstance(value, (int, float)):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            return datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.astimezone(UTC)
    return datetime.fromtimestamp(time.time(), UTC)
