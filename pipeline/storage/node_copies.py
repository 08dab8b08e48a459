"""Artifacts on this machine: fetched and checked once, by whichever of its processes is first.

    <MGPP_CACHE>/artifacts/<stage>-<key>-<attempt>/
        files/...     as they are in storage, where that is remote
        work.lock     held by the process that fetches or checks
        use.lock      held, shared, by processes that use it

The kernel lets go of a dead process's locks, so what is in use is known for certain. A copy outlives the
stage that used it, for the next one, and is deleted when the command ends (`remove_unused`); one that a
killed command left, when it was not used for an hour or its room is needed.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from errno import EDQUOT, ENOSPC, EROFS
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from pipeline.errors import StageError
from pipeline.storage.checksum_cache import cache_folder, mismatch
from pipeline.storage.filesystems import is_local, open_storage

_IDLE_SECONDS = 3600.0
_THREADS = 8
_GB = 1e9
_RECORDS = ("logs", "tensorboard")  # for people: no stage reads them


class DamagedArtifactError(StageError):
    """An artifact whose files are not what was committed.

    Attributes:
        url: the attempt's folder.
        problems: how each file that is wrong differs, by its name.
    """

    def __init__(self, url: str, problems: Mapping[str, str]) -> None:
        self.url, self.problems = url, dict(problems)
        super().__init__(url, self.problems)  # exceptions cross process borders by their arguments

    def __str__(self) -> str:
        storage = self.url.rsplit("/", 2)[0]
        return (
            f"{self.url}: {described(self.problems)}; `mgpp store verify {storage} --discard` deletes "
            "what is damaged, and the run that made it makes it again"
        )


def described(problems: Mapping[str, str]) -> str:
    """Return in words what is wrong with files, the first one named."""
    name, how = next(iter(sorted(problems.items())))
    others = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
    return f"{name} {how}{others}"


def needed(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the files of an artifact that stages read: all but logs and TensorBoard's."""
    return {n: entry for n, entry in files.items() if n.partition("/")[0] not in _RECORDS}


def sizes_problem(
    found: Mapping[str, int], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Return which needed files are missing or cut off, given the sizes of those that are there."""
    problems = {}
    for name, entry in needed(files).items():
        if name not in found:
            problems[name] = "is missing"
        elif found[name] != entry["bytes"]:
            problems[name] = f"has {found[name]} bytes, not {entry['bytes']}"
    return problems


def local_folder(url: str, files: Mapping[str, Mapping[str, Any]]) -> Path:
    """Return a folder of this machine with an artifact's files, each of which is what was committed.

    Args:
        url: the attempt's folder.
        files: entries of the manifest, by relative path.

    Raises:
        DamagedArtifactError: if storage holds something else.
        StageError: if there is no room for a copy.
    """
    filesystem, root = open_storage(url)
    wanted = needed(files)
    if is_local(filesystem):
        with _one_at_a_time(url, required=False):
            problems, folder = _problems(Path(root), wanted), Path(root)
    else:
        folder = _claimed(url) / "files"
        with _one_at_a_time(url, required=True):
            problems = _fetched(filesystem, root, folder, wanted)
    if problems:
        raise DamagedArtifactError(url, problems)
    return folder


def new_copy(url: str) -> Path:
    """Return an empty folder here for what becomes an artifact, and this machine's copy of it."""
    folder = _claimed(url) / "files"
    folder.mkdir(exist_ok=True)
    return folder


def release() -> None:
    """Let go of all copies that this process uses; delete those that nobody used for an hour."""
    _use.cache_clear()
    remove_unused(idle_seconds=_IDLE_SECONDS)


def remove_unused(*, idle_seconds: float = 0.0) -> None:
    """Delete the copies that no process uses.

    Args:
        idle_seconds: only those that were not used for so long.
    """
    for place in _places():
        try:
            with (place / "use.lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(file.fileno()).st_mtime >= idle_seconds:
                    shutil.rmtree(place)
        except OSError:  # in use; or another process deletes it
            continue


def _places() -> list[Path]:
    folder = cache_folder() / "artifacts"
    return list(folder.iterdir()) if folder.is_dir() else []


def _place(url: str) -> Path:
    return cache_folder() / "artifacts" / "-".join(url.rstrip("/").split("/")[-2:])


def _claimed(url: str) -> Path:
    """Return an artifact's place on this machine, which stays until this process releases it or ends.

    Raises:
        StageError: if it cannot be made.
    """
    place = _place(url)
    try:
        os.utime(_use(place).fileno())
    except OSError as error:
        raise _no_room(place, error) from error
    return place


@cache
def _use(place: Path) -> BinaryIO:
    """Return a place's lock, held as long as the file is open."""
    path = place / "use.lock"
    while True:
        place.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # deleted a moment ago
            file = path.open("ab")
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file


@contextmanager
def _one_at_a_time(url: str, *, required: bool) -> Iterator[None]:
    """Let one process of this machine in; all of them, unless required, where no lock can be made."""
    try:
        lock: Any = (_claimed(url) / "work.lock").open("ab")
    except (OSError, StageError):
        if required:
            raise
        lock = nullcontext()
    with lock as file:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _problems(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return how files differ from their entries, by name."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: mismatch(folder / name, files[name]), files)
        return {name: how for name, how in zip(files, found, strict=True) if how}


def _fetched(
    filesystem: fsspec.AbstractFileSystem,
    root: str,
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    """Fetch the files that are not here as they should be; return what is wrong after two tries."""
    for _ in range(2):
        wrong = _problems(folder, files)
        if not wrong:
            return {}
        _make_room(folder, sum(files[name]["bytes"] for name in wrong))
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(partial(_fetch, filesystem, root, folder), wrong))
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT, EROFS):
                raise _no_room(folder, error) from error
            raise
    return _problems(folder, files)


def _fetch(filesystem: fsspec.AbstractFileSystem, root: str, folder: Path, name: str) -> None:
    """Copy one file here; one that is not in storage stays missing."""
    path, part = folder / name, folder / f"{name}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        filesystem.get_file(f"{root.rstrip('/')}/{name}", str(part))
    except FileNotFoundError:
        part.unlink(missing_ok=True)
        return
    # Whatever changes it from here on changes its time: so its checksum can be remembered at once.
    os.utime(part, (0, 0))
    part.replace(path)


def _make_room(folder: Path, size: int) -> None:
    """Check that there is room for so many bytes, without unused copies if need be.

    Raises:
        StageError: if there is not.
    """
    remove_unused(idle_seconds=_IDLE_SECONDS)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free >= size:
        return
    remove_unused()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StageError(
            f"{cache_folder()} has {free / _GB:.1f} GB free, and {folder.parent.name} takes "
            f"{size / _GB:.1f} GB: make room, or let MGPP_CACHE name a folder of a larger disk"
        )


def _no_room(folder: Path, error: Exception) -> StageError:
    return StageError(
        f"{folder} cannot be written: {error}; make room, or let MGPP_CACHE name another folder"
    )
