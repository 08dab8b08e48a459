"""Rows mapped by several processes, part by part; what is finished of them outlives a kill."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

_MAX_PARTS = 512  # of a split: each is an open file in the end
_BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1000  # of the rows that are encoded at once
_SECONDS_BETWEEN = 1.0  # reports

Encode = Callable[[dict[str, list[Any]], range], dict[str, Any]]
"""Makes columns of a batch of rows, given the places of these in their split."""


class RowMapper:
    """Maps the rows of splits in several processes.

    A split is cut by its size alone. Each part is a file that is named by its rows and its checksum: so
    rows are the same for any number of processes, and the next attempt uses the parts of one that was
    killed.

    Args:
        num_proc: processes.
        folder: where parts are kept until all is done, for one key alone; None: nowhere, and rows come
            back in memory.
        progress: called with records for people to watch, at most one a second.
        part_bytes: of the rows that become a part, on average; more where there are many rows.
    """

    def __init__(
        self,
        *,
        num_proc: int = 1,
        folder: Path | None = None,
        progress: Callable[[dict[str, Any]], None] = lambda record: None,
        part_bytes: int = 1 << 20,
    ) -> None:
        self._num_proc = num_proc
        self._part_bytes = part_bytes
        self._folder = folder
        self._progress = progress

    def map(
        self,
        what: str,
        name: str,
        rows: Dataset,
        encode: Encode,
        features: Features,
        *,
        copies: int = 2,
    ) -> Dataset:
        """Return the rows that `encode` makes, in order.

        Args:
            what: is done, in one word ("tokenize").
            name: of the split.
            rows: of the split.
            encode: what it makes of a row must not depend on the other rows of its batch.
            features: types of the columns that it makes.
            copies: how many times what it makes lies on disk before all is done.

        Raises:
            StageError: if a process is killed, or the disk has no room for the rows.
        """
        with self._place(what, name) as folder:
            job = _Job(rows=rows, encode=encode, features=features, folder=folder)
            parts = job.parts(self._part_bytes)
            files = {part: path for part in parts if (path := job.found(part)) is not None}
            report = self.reporter(f"{what} {name}", len(rows), done=sum(map(len, files)))
            if files:
                text = f"{what} {name}: {len(files)} of {len(parts)} parts were made before"
                self._progress({"event": "note", "text": text})
            for part, path in self._made(job, [part for part in parts if part not in files]):
                files[part] = path
                report(len(part))
                if self._folder is not None:
                    left = len(rows) * copies - sum(map(len, files))
                    _refuse_full(folder, path.stat().st_size * left // len(part))
            return self._open([files[part] for part in parts], features)

    def write(
        self, what: str, name: str, tables: Iterable[pa.Table], features: Features
    ) -> Dataset:
        """Return rows that come table by table, written to one file."""
        with self._place(what, name) as folder:
            return self._open([_written(folder, "rows", tables, features)], features)

    def reporter(self, what: str, total: int, done: int = 0) -> Callable[[int], None]:
        """Return a function to call with each number of rows that is done.

        Args:
            what: is done, in words.
            total: rows.
            done: rows that are finished already.
        """
        return _Reporter(self._progress, what, total, done)

    @contextmanager
    def _place(self, what: str, name: str) -> Iterator[Path]:
        """Give the folder of a split's parts."""
        if self._folder is None:
            with tempfile.TemporaryDirectory(prefix="mgpp-parts-") as temporary:
                yield Path(temporary)
        else:
            folder = self._folder / what / name
            folder.mkdir(parents=True, exist_ok=True)
            yield folder

    def _made(self, job: _Job, parts: list[range]) -> Iterator[tuple[range, Path]]:
        """Make parts and yield each with its file, as they are finished."""
        # A core a process: no threads of the tokenizer's beside them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self._num_proc == 1 or len(parts) < 2:
            for part in parts:
                yield part, job.make(part)
            return
        with ProcessPoolExecutor(
            min(self._num_proc, len(parts)),
            mp_context=multiprocessing.get_context("fork"),
            initializer=_begin,
            initargs=(job,),
        ) as pool:
            futures: dict[Future[Path], range] = {pool.submit(_make, part): part for part in parts}
            try:
                for future in as_completed(futures):
                    yield futures.pop(future), future.result()
            except BrokenProcessPool as error:
                raise StageError(
                    "a process that tokenizes was killed, for want of memory perhaps; with a smaller "
                    "data.num_proc it takes less; rerun to resume from what is done"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    def _open(self, files: list[Path], features: Features) -> Dataset:
        """Return the rows of files, one after the other; equal rows have one fingerprint."""
        from datasets import Dataset, DatasetInfo
        from datasets.table import InMemoryTable, MemoryMappedTable, concat_tables

        kind = InMemoryTable if self._folder is None else MemoryMappedTable
        names = "".join(path.name for path in files)
        return Dataset(
            concat_tables([kind.from_file(str(path)) for path in files]),
            info=DatasetInfo(features=features),
            fingerprint=hashlib.sha256(names.encode()).hexdigest()[:16],
        )


IN_MEMORY = RowMapper()
"""In this process, for few rows."""


def num_processes(num_proc: int | str) -> int:
    """Return `data.num_proc` as a number: `auto` is all cores that this process may use."""
    return len(os.sched_getaffinity(0)) if isinstance(num_proc, str) else num_proc


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One split to map: what a process needs to make a part of it."""

    rows: Dataset
    encode: Encode
    features: Features
    folder: Path

    def parts(self, part_bytes: int) -> list[range]:
        """Return the rows of each part."""
        # Of all rows of the table: the split may be a selection of them.
        each = max(self.rows.data.nbytes, 1) / max(self.rows.data.num_rows, 1)
        size = int(max(part_bytes / each, len(self.rows) / _MAX_PARTS, 1))
        starts = range(0, len(self.rows), size)
        return [range(start, min(start + size, len(self.rows))) for start in starts]

    def found(self, part: range) -> Path | None:
        """Return a part's file if it is there and its content is what its name says."""
        for path in self.folder.glob(f"{_stem(part)}-*.arrow"):
            if path.name == _name(_stem(part), path):
                return path
            path.unlink()
        return None

    def make(self, part: range) -> Path:
        """Write a part's file and return its path."""
        batches = self._batches(part.start, part.stop)
        return _written(self.folder, _stem(part), map(self._encoded, batches), self.features)

    def _encoded(self, places: range) -> dict[str, Any]:
        return self.encode(self.rows[places.start : places.stop], places)

    def _batches(self, start: int, stop: int) -> Iterator[range]:
        """Yield the rows of batches, each small enough for memory unless it is one row."""
        table = self.rows.with_format("arrow")[start:stop]
        if stop - start > 1 and (stop - start > _BATCH_ROWS or table.nbytes > _BATCH_BYTES):
            middle = (start + stop) // 2
            yield from self._batches(start, middle)
            yield from self._batches(middle, stop)
        else:
            yield range(start, stop)


class _Reporter:
    """Counts rows and reports them at most once a second, with the seconds that the others will take."""

    def __init__(
        self, progress: Callable[[dict[str, Any]], None], what: str, total: int, done: int
    ) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._before = self._done = done
        self._began = time.monotonic()
        self._next = self._began
        self(0)

    def __call__(self, rows: int) -> None:
        self._done += rows
        now = time.monotonic()
        if now < self._next and self._done < self._total:
            return
        self._next = now + _SECONDS_BETWEEN
        record = {"event": "rows", "what": self._what, "done": self._done, "total": self._total}
        if self._done > self._before:
            each = (now - self._began) / (self._done - self._before)
            record["seconds_left"] = each * (self._total - self._done)
        self._progress(record)


def _written(folder: Path, stem: str, content: Iterable[Any], features: Features) -> Path:
    """Write columns or tables to a file, which gets its name when it is complete."""
    from datasets.arrow_writer import ArrowWriter

    unfinished = folder / f".{uuid.uuid4().hex[:8]}"
    with ArrowWriter(features=features, path=str(unfinished)) as writer:
        for some in content:
            if isinstance(some, dict):
                writer.write_batch(some)
            else:
                writer.write_table(some)
        writer.finalize()
    return unfinished.rename(folder / _name(stem, unfinished))


def _stem(part: range) -> str:
    return f"{part.start:012d}-{part.stop:012d}"


def _name(stem: str, path: Path) -> str:
    with path.open("rb") as file:
        return f"{stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.arrow"


def _refuse_full(folder: Path, wanted: int) -> None:
    """Refuse to continue where the disk will be full before all rows are written.

    Raises:
        StageError: with the bytes that are wanted, and those that are free.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StageError(
            f"{folder} is on a disk with {free / 1e9:.1f} GB left, and the rows yet to be written take "
            f"about {wanted / 1e9:.1f} GB: make room and rerun to resume from what is done"
        )


_job: _Job | None = None  # of a process of the pool: inherited, for functions cannot be sent


def _begin(job: _Job) -> None:
    global _job  # noqa: PLW0603
    _job = job
    # Who interrupts all processes of a terminal means the first one, and its handlers are its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(part: range) -> Path:
    assert _job is not None
    return _job.make(part)
