"""What lies in an artifact store: listed, cleared of garbage, checked against its checksums."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import fsspec

from pipeline.errors import ConfigError
from pipeline.store.artifacts import DONE_FILE, FAILED_FILE, Artifact, ArtifactStore, stream_sha256
from pipeline.store.leases import Lease, LeaseFolder
from pipeline.store.parts import PARTS
from pipeline.store.storage import absolute_url, open_storage, storage_problems

_KEY_FOLDER = re.compile(r"(?P<stage>[a-z][a-z_]*)-(?P<key>[0-9a-f]{16})")
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key of a store.

    Attributes:
        stage: the stage's name.
        key: hexadecimal name of all that went into it.
        url: the key's folder.
        artifact: what is done; None while it is not.
        lease: who works on it, or did; None if nobody.
        files: bytes and time of writing (UTC) of each file, by path relative to the folder.
    """

    stage: str
    key: str
    url: str
    artifact: Artifact | None
    lease: Lease | None
    files: dict[str, tuple[int, datetime]]

    @property
    def state(self) -> str:
        """Whether it is `done`, `running`, or `unfinished`."""
        if self.artifact is not None:
            return "done"
        return "running" if self.is_held else "unfinished"

    @property
    def is_held(self) -> bool:
        """Whether someone works on it, as far as this machine can know."""
        return self.lease is not None and self.lease.is_held

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(size for size, _ in self.files.values())

    @property
    def changed(self) -> datetime | None:
        """When a file was written last (UTC)."""
        return max((when for _, when in self.files.values()), default=None)


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


def usable_store(storage: str) -> ArtifactStore:
    """Return the store of a run's `storage`.

    Raises:
        ConfigError: if it cannot be used.
    """
    problems = storage_problems(storage)
    if problems:
        raise ConfigError(problems)
    return ArtifactStore(absolute_url(storage))


def entries(store: ArtifactStore) -> Iterator[Entry]:
    """Yield what is in a store, by name."""
    filesystem, root = open_storage(store.url)
    if not filesystem.exists(root):
        return
    for path in sorted(str(p).rstrip("/") for p in filesystem.ls(root, detail=False)):
        named = _KEY_FOLDER.fullmatch(path.rpartition("/")[2])
        if named is None:
            continue
        url = store.folder_of(named["stage"], named["key"])
        yield Entry(
            stage=named["stage"],
            key=named["key"],
            url=url,
            artifact=store.find(named["stage"], named["key"]),
            lease=LeaseFolder(url).newest(),
            files=_files(filesystem, path),
        )


def garbage(entry: Entry, *, older_than_days: float) -> list[Garbage]:
    """Return what can be deleted of an entry; nothing while someone works on it.

    That is abandoned attempts, checkpoints and leases of finished work, and all of an unfinished entry
    untouched for a time: until then its checkpoints and parts are kept for a run to resume from.

    Args:
        entry: of the store.
        older_than_days: that time; also after which a lease of a machine that cannot be asked is
            taken for dead.
    """
    age = (datetime.now(UTC) - entry.changed).total_seconds() / 86400 if entry.changed else 0.0
    if entry.is_held and age <= older_than_days:
        return []
    needed = {DONE_FILE}
    if entry.artifact is not None:
        needed.add(entry.artifact.url.rpartition("/")[2])
        why = "left over from finished work"
    elif age > older_than_days:
        why = f"unfinished and untouched for {age:.0f} days"
    else:
        needed |= {_CHECKPOINTS, PARTS, FAILED_FILE}
        why = "an abandoned attempt"
    sizes: dict[str, int] = {}
    for name, (size, _) in entry.files.items():
        top = name.partition("/")[0]
        if top not in needed:
            sizes[top] = sizes.get(top, 0) + size
    return [Garbage(url=f"{entry.url}/{top}", size=size, why=why) for top, size in sizes.items()]


def problems_of(entry: Entry) -> list[str]:
    """Read a finished artifact's files; return which are missing, truncated or changed."""
    if entry.artifact is None:
        return []
    filesystem, root = open_storage(entry.artifact.url)
    problems = []
    for name, expected in entry.artifact.files.items():
        path = f"{root}/{name}"
        try:
            with filesystem.open(path, "rb") as file:
                digest, size = stream_sha256(file)
        except FileNotFoundError:
            problems.append(f"{entry.artifact.url}/{name} is missing")
            continue
        if size != expected["bytes"]:
            problems.append(
                f"{entry.artifact.url}/{name} has {size} bytes, not {expected['bytes']}"
            )
        elif digest != expected["sha256"]:
            problems.append(f"{entry.artifact.url}/{name} has another checksum")
    return problems


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
