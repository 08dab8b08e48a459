"""Where a training run's checkpoints lie: complete or ignored, the newest good one used.

    <url>/step-00000500-3fa2c1/...               what the workers wrote, straight to storage
    <url>/step-00000500-3fa2c1/part-r00003.json  the names of what worker 3 wrote in the background
    <url>/step-00000500-3fa2c1/DONE_FILE.json        written last: step, world size, each file's checksums

Storage is a local or shared folder or any fsspec URL. What a thread does here is agreed upon through
storage, never by collectives, which the training uses meanwhile.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import fsspec

from pipeline.errors import DamagedFileError, StageError, error_text, is_storage_failure
from pipeline.storage.checksums import HashingStream
from pipeline.storage.filesystems import open_storage, put_json, read_json
from pipeline.storage.records import put_record
from pipeline.storage.verified import VerifiedFiles
from pipeline.storage.writing import BackgroundThread, written
from pipeline.store.checkpoint_manifest import DONE_FILE, Manifest, good_manifest
from pipeline.worker_group import WorkerGroup

_Loaded = TypeVar("_Loaded")
_POLL_SECONDS = (0.02, 2.0)  # between two looks for the parts of the others: at first, at most
_logger = logging.getLogger(__name__)


class SavedCheckpoint:
    """A complete checkpoint; its bytes are checked as they are read.

    Args:
        manifest: its step, world size and files.
        files: read from storage as they are needed.
    """

    def __init__(self, manifest: Manifest, files: VerifiedFiles) -> None:
        self.manifest = manifest
        self.read = files.read


class CheckpointFiles:
    """What one worker writes of a checkpoint: files that go to storage as they are made.

    Args:
        filesystem: of the storage.
        folder: of the checkpoint.
        rank: of the worker.
        check: called as bytes pass; raises to stop.

    Attributes:
        entries: of the files that are whole: size, checksums, rank.
    """

    def __init__(
        self,
        filesystem: fsspec.AbstractFileSystem,
        folder: str,
        rank: int,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._fs, self._folder, self._rank, self._check = filesystem, folder, rank, check

    @contextmanager
    def file(self, name: str) -> Iterator[HashingStream]:
        """Give a stream that is the file `name` when the block ends; any thread may call."""
        with written(self._fs, f"{self._folder}/{name}", self._check) as stream:
            yield stream
        self.entries[name] = {**stream.entry(), "rank": self._rank}

    def put(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.file(name) as stream:
            stream.write(data)


Write = Callable[[CheckpointFiles], None]


class CheckpointStore:
    """The checkpoints of one run; every worker has one, and all call its methods together.

    Args:
        url: their folder; a local path must be the same folder for all workers.
        workers: all of them.
        keep: how many complete ones are kept; one more is there while it is written.
        notify: called with notes for people: a corrupt checkpoint, the step the run resumes from.
        patience: seconds that the main worker waits for what the others write in the background once its
            own part is written.
    """

    def __init__(
        self,
        url: str,
        workers: WorkerGroup,
        *,
        keep: int = 2,
        notify: Callable[[str], None] | None = None,
        patience: float = 1800,
    ) -> None:
        self._url = url
        self._fs, self._root = open_storage(url)
        self._workers = workers
        self._keep = keep
        self._notify = notify or _logger.warning
        self._patience = patience
        self._thread: BackgroundThread | None = None

    def part(self, name: str) -> "CheckpointStore":
        """Return a store for one part of the run, kept beside the others and discarded with them."""
        return CheckpointStore(f"{self._url}/{name}", self._workers, keep=1, notify=self._notify)

    def save(self, write: Write, step: int, *, in_background: bool = False) -> None:
        """Let every worker write its part, and keep the whole; one that is being written is waited for.

        Args:
            write: writes this worker's part. In the background it is called by a thread, so it must join
                no collective and read nothing that the training changes.
            step: optimizer steps done.
            in_background: return at once; the checkpoint counts when all parts are there.

        Raises:
            StageError: if storage does not take it, or did not take the one before; what was saved
                before is still good.
        """
        self.settle()
        folder = self._workers.broadcast(
            f"{self._root}/step-{step:08d}-{uuid.uuid4().hex[:6]}"
            if self._workers.is_main
            else None
        )
        if in_background:
            self._thread = BackgroundThread(
                lambda check: self._write_in_background(write, step, folder, check)
            )
            return
        with self._explained(step):
            files = CheckpointFiles(self._fs, folder, self._workers.rank)
            write(files)
            parts = self._workers.gather(files.entries)
            if parts is not None:
                self._complete(step, folder, parts)

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did; a worker may call it by itself."""
        if self._thread is not None and self._thread.has_ended:
            self.settle()

    def settle(self) -> None:
        """Wait until this worker's part of what is written in the background is in storage.

        On the main worker: until the checkpoint is complete.

        Raises:
            StageError: as `save` does.
        """
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.join()

    def abandon(self) -> None:
        """Give up what is being written in the background: it will never be complete."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.stop()

    def restore(
        self, load: Callable[[SavedCheckpoint], _Loaded], *, announced: bool = True
    ) -> _Loaded | None:
        """Load the newest good checkpoint, if there is one.

        Args:
            load: reads what this worker needs; must join no collective. It is called again with an older
                checkpoint if any worker came upon damage, so what it changed must be overwritten then.
            announced: whether to note its step.

        Returns:
            What `load` returned; None where there is no good checkpoint.
        """
        if self._workers.is_main:
            self._drop_incomplete()
        candidates = self._workers.broadcast(
            self._folders_done() if self._workers.is_main else None
        )
        for folder in candidates:
            manifest, problems = self._workers.broadcast(
                self._looked_over(folder) if self._workers.is_main else None
            )
            loaded = None
            if not problems:
                files = VerifiedFiles(self._fs, folder, manifest.files)
                try:
                    loaded = load(SavedCheckpoint(manifest, files))
                except DamagedFileError as error:
                    problems = [str(error)]
                found = self._workers.gather(problems)
                problems = self._workers.broadcast(found and [p for part in found for p in part])
            if not problems:
                if announced:
                    self.note(f"resuming from the checkpoint of step {manifest.step}")
                return loaded
            self.note(f"checkpoint {folder} is corrupt and skipped: {'; '.join(problems)}")
        return None

    def discard(self) -> None:
        """Delete all checkpoints; the main worker calls it when the run's output is safe."""
        self.abandon()
        if self._fs.exists(self._root):
            self._fs.rm(self._root, recursive=True)

    def note(self, text: str) -> None:
        """Pass a note for people on, once for all workers."""
        if self._workers.is_main:
            self._notify(text)

    def _write_in_background(
        self, write: Write, step: int, folder: str, check: Callable[[], None]
    ) -> None:
        """Write this worker's part; on the main worker also await the others', and the manifest."""
        part = f"{folder}/{_part_file(self._workers.rank)}"
        with self._explained(step):
            try:
                files = CheckpointFiles(self._fs, folder, self._workers.rank, check)
                write(files)
                put_json(self._fs, part, {"files": files.entries})
            except Exception as error:
                with suppress(Exception):  # so that the main worker need not wait; it may not work
                    put_json(self._fs, part, {"error": error_text(error)})
                raise
            if self._workers.is_main:
                parts = self._await_parts(step, folder, check)
                check()
                self._complete(step, folder, parts)

    def _await_parts(
        self, step: int, folder: str, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Return what every worker wrote, once it has.

        Raises:
            StageError: if one of them failed or takes too long.
        """
        found: dict[int, dict[str, Any]] = {}
        ranks = range(self._workers.world_size)
        pause, most = _POLL_SECONDS
        deadline = time.monotonic() + self._patience
        while True:
            for rank in set(ranks) - set(found):
                part = read_json(self._fs, f"{folder}/{_part_file(rank)}")
                if part is not None and "error" in part:
                    raise StageError(
                        f"the checkpoint of step {step} could not be written by worker {rank}: "
                        f"{part['error']}; what was saved before is good"
                    )
                if part is not None:
                    found[rank] = part["files"]
            if len(found) == len(ranks):
                return [found[rank] for rank in ranks]
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in ranks if rank not in found)
                raise StageError(
                    f"the checkpoint of step {step} is not complete: {self._patience:.0f} s after the "
                    f"main worker, workers {missing} have not written their parts; what was saved "
                    "before is good"
                )
            check()
            time.sleep(pause)
            pause = min(2 * pause, most)

    def _complete(self, step: int, folder: str, parts: list[dict[str, Any]]) -> None:
        """Write the manifest, then delete the oldest checkpoints."""
        files = {path: entry for part in parts for path, entry in part.items()}
        manifest = Manifest(step=step, world_size=self._workers.world_size, files=files)
        put_record(self._fs, f"{folder}/{DONE_FILE}", manifest)
        for old in self._folders_done()[self._keep :]:
            self._fs.rm(f"{old}/{DONE_FILE}")  # first: from now on it is no checkpoint
            self._fs.rm(old, recursive=True)

    def _folders(self) -> list[str]:
        """Return all checkpoints, complete or not, the newest step first."""
        try:
            entries = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = (str(entry).rstrip("/") for entry in entries)
        return sorted((n for n in names if n.rpartition("/")[2].startswith("step-")), reverse=True)

    def _folders_done(self) -> list[str]:
        return [folder for folder in self._folders() if self._fs.exists(f"{folder}/{DONE_FILE}")]

    def _drop_incomplete(self) -> None:
        """Delete what was left half-written; only when a run begins, so that none is at work on it."""
        for folder in set(self._folders()) - set(self._folders_done()):
            self._fs.rm(folder, recursive=True)

    def _looked_over(self, folder: str) -> tuple[Manifest | None, list[str]]:
        """Return a checkpoint's manifest and what a listing shows to be wrong with its files."""
        manifest = good_manifest(self._fs, folder)
        if manifest is None:
            return None, [f"{DONE_FILE} cannot be read or names no files"]
        listed: Mapping[str, Any] = self._fs.find(folder, detail=True)
        sizes = {str(path)[len(folder) + 1 :]: info["size"] for path, info in listed.items()}
        problems = [f"{name} is missing" for name in manifest.files if name not in sizes]
        problems += [
            f"{name} has {sizes[name]} bytes, not {entry['bytes']}"
            for name, entry in manifest.files.items()
            if sizes.get(name, entry["bytes"]) != entry["bytes"]
        ]
        return manifest, problems

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turn what full or unwritable storage raises into advice; the rest stays what it is.

        That is a lost peer, a storage that may come back, or what the engine has to say.
        """
        try:
            yield
        except Exception as error:
            if not is_storage_failure(error):
                raise
            raise StageError(
                f"the checkpoint of step {step} could not be written to {self._root}: {error}; what was "
                "saved before is good: make room, or make it writable, and run the same command again"
            ) from error


def _part_file(rank: int) -> str:
    return f"part-r{rank:05d}.json"
