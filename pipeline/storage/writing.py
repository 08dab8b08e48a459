"""Files written front to back to any storage, whole or not there at all, and threads that write them.

Object stores take them in parts as they come, so nothing is kept on a local disk. A part that was sent
for a file that did not become whole is withdrawn; only what a killed process had sent is left to the
store's own rule for incomplete uploads.
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile

from pipeline.storage.checksums import HashingStream, Stream
from pipeline.storage.filesystems import is_local

PART_BYTES = 16 << 20  # a request to an object store: 10,000 a file, of 5 MiB at least
STEP_BYTES = 4 << 20  # handed on at a time: a buffer never holds much more than a part


@contextmanager
def written(
    filesystem: fsspec.AbstractFileSystem, path: str, check: Callable[[], None] | None = None
) -> Iterator[HashingStream]:
    """Give a stream that becomes the file at `path` when the block ends, with checksums as it passes.

    Where the block raises, nothing is at `path`. What it takes of memory is about four parts.

    Args:
        filesystem: of the storage.
        path: of the file in it.
        check: called before every step; raises to stop.
    """
    file: Any = (
        _LocalFile(path)
        if is_local(filesystem)
        else filesystem.open(path, "wb", block_size=PART_BYTES)
    )
    try:
        yield HashingStream(_InSteps(file, check))
        file.close()
    except BaseException:
        with suppress(Exception):  # what made the write fail may fail this too, and says more
            file.discard()
        if isinstance(file, AbstractBufferedFile):
            file.closed = True  # or the garbage collector would close it, which keeps what is there
        raise


class _InSteps:
    """Hands bytes on a step at a time."""

    def __init__(self, stream: Stream, check: Callable[[], None] | None) -> None:
        self._stream, self._check = stream, check

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), STEP_BYTES):
            if self._check is not None:
                self._check()
            self._stream.write(view[at : at + STEP_BYTES])


class _LocalFile:
    """A file that lies under another name until it is whole and on the disk."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._beside = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._file = self._beside.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._beside.replace(self._path)

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()  # flushes what a full disk did not take
        self._beside.unlink(missing_ok=True)


class StoppedError(Exception):
    """What a thread does was given up."""


class BackgroundThread:
    """Work on a thread that no one has to wait for: a process that ends takes it with it.

    Args:
        work: is given a function to call now and then, which raises once the work is given up.
    """

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        # The thread alone holds the work, and with it what is written: it is freed at its end.
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="mgpp-writing", daemon=True
        )
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the work is done or has failed."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end; raise what the work raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self, seconds: float = 10.0) -> None:
        """Give the work up, and wait for its end, but not longer than this."""
        self._stopped.set()
        self._thread.join(seconds)

    def _run(self, work: Callable[[Callable[[], None]], None]) -> None:
        try:
            work(self._check)
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            self._error = error

    def _check(self) -> None:
        if self._stopped.is_set():
            raise StoppedError


def run_at_once(jobs: Iterable[Callable[[], None]], num_threads: int) -> None:
    """Do jobs on threads; raise what one of them raised, when no other is at work any more."""
    left, lock = iter(jobs), threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            with lock:
                job = next(left, None)
            if job is None:
                return
            try:
                job()
            except BaseException as error:  # noqa: BLE001  # raised below
                errors.append(error)

    threads = [
        threading.Thread(target=work, name="mgpp-writing", daemon=True) for _ in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
