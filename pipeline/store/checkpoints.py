"""Where a training run's checkpoints lie: complete or ignored, the newest good one used.

    <url>/step-00000500-3fa2c1/...         what the workers wrote
    <url>/step-00000500-3fa2c1/_DONE.json  written last: step, world size, size and sha256 of each file

Storage is a local or shared folder or any fsspec URL.
"""

import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import StageError, is_storage_failure
from pipeline.store.artifacts import file_sha256
from pipeline.store.records import DamagedFileError, put_record, read_record
from pipeline.store.storage import is_local, open_storage
from pipeline.worker_group import WorkerGroup

_DONE = "_DONE.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a complete checkpoint.

    Attributes:
        step: optimizer steps done.
        world_size: workers that wrote it.
        files: by relative path: `bytes`, `sha256` and the `rank` that wrote it.
    """

    step: int
    world_size: int
    files: dict[str, dict[str, Any]]


class SavedCheckpoint:
    """A good checkpoint.

    Args:
        manifest: its step, world size and files.
        file: gives the local path of one of its files, copied here first where storage is remote.
    """

    def __init__(self, manifest: Manifest, file: Callable[[str], Path]) -> None:
        self.manifest = manifest
        self.file = file


def read_checkpoint(filesystem: fsspec.AbstractFileSystem, path: str) -> Manifest | None:
    """Return the manifest of a complete checkpoint; None where there is none.

    Raises:
        DamagedFileError: if it is not what was written.
    """
    manifest = read_record(filesystem, path, Manifest)
    if manifest is not None and not manifest.files:
        raise DamagedFileError(path, "names no files")
    for name, entry in manifest.files.items() if manifest else ():
        if not isinstance(entry.get("rank"), int) or not isinstance(entry.get("bytes"), int):
            raise DamagedFileError(path, f"files.{name} has no rank or no size")
    return manifest


def newest_step(url: str) -> int | None:
    """Return the step of the newest complete checkpoint in a run's folder of them, or None."""
    filesystem, root = open_storage(url)
    if not filesystem.exists(root):
        return None
    folders = (str(path).rstrip("/") for path in filesystem.ls(root, detail=False))
    found = [_readable(filesystem, f"{folder}/{_DONE}") for folder in folders if "/step-" in folder]
    return max((manifest.step for manifest in found if manifest), default=None)


class CheckpointStore:
    """The checkpoints of one run; every worker has one, and all call its methods together.

    Args:
        url: their folder; a local path must be the same folder for all workers.
        workers: all of them.
        keep: how many complete ones are kept.
        notify: called with notes for people: a corrupt checkpoint, the step the run resumes from.
    """

    def __init__(
        self,
        url: str,
        workers: WorkerGroup,
        *,
        keep: int = 2,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._url = url
        self._fs, self._root = open_storage(url)
        self._is_local = is_local(self._fs)
        self._workers = workers
        self._keep = keep
        self._notify = notify or _logger.warning

    def part(self, name: str) -> "CheckpointStore":
        """Return a store for one part of the run, kept beside the others and discarded with them."""
        return CheckpointStore(f"{self._url}/{name}", self._workers, keep=1, notify=self._notify)

    def save(self, write: Callable[[Path], None], step: int) -> None:
        """Let every worker write its part into a folder of its own, and keep the whole.

        Raises:
            StageError: if storage does not take it; what was saved before is still good.
        """
        name = self._workers.broadcast(f"step-{step:08d}-{uuid.uuid4().hex[:6]}")
        target = f"{self._root}/{name}"
        try:
            with self._staging(target) as staging:
                write(staging)
                files = self._describe(staging)
                self._move(staging, target, files)
            parts = self._workers.gather(files)
            if parts is not None:
                merged = {path: entry for part in parts for path, entry in part.items()}
                manifest = Manifest(step=step, world_size=self._workers.world_size, files=merged)
                put_record(self._fs, f"{target}/{_DONE}", manifest)
                for old in self._complete()[self._keep :]:
                    self._fs.rm(old, recursive=True)
        except Exception as error:
            if is_storage_failure(error):
                raise self._not_written(step, error) from error
            raise  # a lost peer, a storage that may come back, or what the engine has to say

    @contextmanager
    def latest(self, *, announced: bool = True) -> Iterator[SavedCheckpoint | None]:
        """Give the newest good checkpoint, or None where there is none; note its step if `announced`."""
        if self._workers.is_main:
            self._drop_incomplete()
        candidates = self._workers.broadcast(self._complete() if self._workers.is_main else None)
        for candidate in candidates:
            with self._fetching(candidate) as file:
                found = self._workers.gather(self._problems(candidate, file))
                all_problems = self._workers.broadcast(
                    found and [p for part in found for p in part]
                )
                if not all_problems:
                    manifest = self._manifest(candidate)
                    assert manifest is not None
                    if announced:
                        self._note(f"resuming from the checkpoint of step {manifest.step}")
                    yield SavedCheckpoint(manifest, file)
                    return
            self._note(f"checkpoint {candidate} is corrupt and skipped: {'; '.join(all_problems)}")
        yield None

    def discard(self) -> None:
        """Delete all checkpoints; the main worker calls it when the run's output is safe."""
        if self._fs.exists(self._root):
            self._fs.rm(self._root, recursive=True)

    @contextmanager
    def _staging(self, target: str) -> Iterator[Path]:
        """Give this worker's own folder, on the same file system where storage is local."""
        if self._is_local:
            Path(target).mkdir(parents=True, exist_ok=True)
        prefix = f".rank{self._workers.rank}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target if self._is_local else None))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _describe(self, folder: Path) -> dict[str, dict[str, Any]]:
        return {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
                "rank": self._workers.rank,
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def _move(self, staging: Path, target: str, files: dict[str, dict[str, Any]]) -> None:
        for name in files:
            if self._is_local:
                path = Path(target) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(path)
            else:
                self._fs.put_file(str(staging / name), f"{target}/{name}")

    def _folders(self) -> list[str]:
        """Return all checkpoints, complete or not, the newest step first."""
        try:
            entries = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = (str(entry).rstrip("/") for entry in entries)
        return sorted((n for n in names if n.rpartition("/")[2].startswith("step-")), reverse=True)

    def _complete(self) -> list[str]:
        return [folder for folder in self._folders() if self._fs.exists(f"{folder}/{_DONE}")]

    def _drop_incomplete(self) -> None:
        """Delete what was left half-written; only when a run begins, so that none is at work on it."""
        for folder in set(self._folders()) - set(self._complete()):
            self._fs.rm(folder, recursive=True)

    def _manifest(self, folder: str) -> Manifest | None:
        return _readable(self._fs, f"{folder}/{_DONE}")

    @contextmanager
    def _fetching(self, folder: str) -> Iterator[Callable[[str], Path]]:
        """Give a function from a checkpoint's files to their paths on this machine."""
        if self._is_local:
            yield Path(folder).joinpath
            return
        with tempfile.TemporaryDirectory(prefix="mgpp-checkpoint-") as copy:

            def fetch(name: str) -> Path:
                path = Path(copy) / name
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(f"{folder}/{name}", str(path))
                return path

            yield fetch

    def _problems(self, folder: str, file: Callable[[str], Path]) -> list[str]:
        """Return what is wrong with the files that fall to this worker: its own, if it wrote any."""
        manifest = self._manifest(folder)
        if manifest is None:
            return [f"{_DONE} cannot be read"] if self._workers.is_main else []
        problems = []
        for name, entry in manifest.files.items():
            if entry["rank"] % self._workers.world_size != self._workers.rank:
                continue
            if not self._fs.exists(f"{folder}/{name}"):
                problems.append(f"{name} is missing")
            elif (size := self._fs.size(f"{folder}/{name}")) != entry["bytes"]:
                problems.append(f"{name} has {size} bytes, not {entry['bytes']}")
            elif file_sha256(file(name)) != entry["sha256"]:
                problems.append(f"{name} has another checksum")
        return problems

    def _note(self, text: str) -> None:
        if self._workers.is_main:
            self._notify(text)

    def _not_written(self, step: int, error: Exception) -> StageError:
        return StageError(
            f"the checkpoint of step {step} could not be written to {self._root}: {error}; what was "
            "saved before is good: make room, or make it writable, and run the same command again"
        )


def _readable(filesystem: fsspec.AbstractFileSystem, path: str) -> Manifest | None:
    try:
        return read_checkpoint(filesystem, path)
    except DamagedFileError:
        return None
