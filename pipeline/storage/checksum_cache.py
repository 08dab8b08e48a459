"""Checksums of this machine's files, remembered: a file that did not change is not read again.

    <MGPP_CACHE>/checksums-1.sqlite     shared by all processes; may be deleted at any time

A file is the same while its path, size, inode and times of modification and of status change are. As in
git, one that was modified within the clock's granularity of being read is not remembered: it could change
again and show the same times.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import StageError
from pipeline.storage.checksums import describe

_GRANULARITY = 2_000_000_000  # nanoseconds: FAT's, the coarsest clock of a file system in use
_KEPT_SECONDS = 90 * 86400
_LOCKED_SECONDS = 10.0
_CREATE = """
    CREATE TABLE IF NOT EXISTS files (
        path TEXT, kind TEXT, state TEXT, value TEXT, written INTEGER, seal TEXT, PRIMARY KEY (path, kind)
    ) WITHOUT ROWID
"""
_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where this machine keeps what can be made again: MGPP_CACHE, or ~/.cache/mgpp."""
    given = os.environ.get("MGPP_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgpp"


def content_checksum(path: Path) -> str:
    """Return the sha256 of a file's bytes; it is read if it is not known.

    Raises:
        StageError: if it changes while it is read.
    """
    path = path.resolve()
    return _once_a_process(cache_folder(), path, _State.of(path))


def description(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest; it is read, and remembered."""
    path, began = path.resolve(), time.time_ns()
    state = _State.of(path)
    entry = describe(path)
    _keep(path, "blocks", state, _joined(entry["blocks"]), began)
    return entry


def mismatch(path: Path, entry: Mapping[str, Any]) -> str | None:
    """Return how a file differs from its entry in a manifest, or None; it is read if it is not known."""
    try:
        path = path.resolve()
        state = _State.of(path)
    except FileNotFoundError:
        return "is missing"
    if state.size != entry["bytes"]:
        return f"has {state.size} bytes, not {entry['bytes']}"
    kind = "blocks" if "blocks" in entry else "sha256"
    expected = _joined(entry["blocks"]) if kind == "blocks" else entry["sha256"]
    # What is remembered can clear a file, but not condemn it: the memory may be what is wrong.
    if _memory(cache_folder(), os.getpid()).find(path, kind, state) == expected:
        return None
    return None if _read(path, kind, state) == expected else "has another checksum"


class _State(NamedTuple):
    """What tells that a file is the same: bytes, nanoseconds of its times, and its inode."""

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "_State":
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def __str__(self) -> str:
        return ":".join(map(str, self))


@cache
def _once_a_process(folder: Path, path: Path, state: _State) -> str:
    known = _memory(folder, os.getpid()).find(path, "sha256", state)
    if known is not None:
        return known
    value, after = _read(path, "sha256", state), _State.of(path)
    if (after.size, after.modified) != (state.size, state.modified):
        raise StageError(
            f"{path} changed while it was read: let nothing write to it, and try again"
        )
    return value


def _read(path: Path, kind: str, state: _State) -> str:
    """Return a file's checksum: of its bytes ("sha256"), or of its blocks' ("blocks")."""
    began = time.time_ns()
    if kind == "blocks":
        value = _joined(describe(path)["blocks"])
    else:
        with path.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
    _keep(path, kind, state, value, began)
    return value


def _keep(path: Path, kind: str, state: _State, value: str, began: int) -> None:
    """Remember a checksum, unless the file may have changed since its state was taken."""
    if _State.of(path) != state:
        raise StageError(
            f"{path} changed while it was read: let nothing write to it, and try again"
        )
    if began - state.modified > _GRANULARITY:
        _memory(cache_folder(), os.getpid()).keep(path, kind, state, value)


def _joined(blocks: list[str]) -> str:
    return hashlib.sha256("".join(blocks).encode()).hexdigest()


@cache
def _memory(folder: Path, process: int) -> "_Memory":
    return _Memory(folder / "checksums-1.sqlite")


class _Memory:
    """The table on disk. Where it cannot be read or written, nothing is known; a damaged one is replaced.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._left = 2  # times that it is opened

    def find(self, path: Path, kind: str, state: _State) -> str | None:
        """Return what is known of a file in this state, or None."""
        query = "SELECT value, seal FROM files WHERE path = ? AND kind = ? AND state = ?"
        key = (str(path), kind, str(state))
        for value, seal in self._run(query, key):
            # SQLite takes a flipped bit of a value for the value.
            if seal == _seal(*key, value):
                return str(value)
        return None

    def keep(self, path: Path, kind: str, state: _State, value: str) -> None:
        """Remember what a file in this state has."""
        key = (str(path), kind, str(state))
        row = (*key, value, int(time.time()), _seal(*key, value))
        self._run("REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", row)

    def _run(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            while True:
                try:
                    if self._connection is None:
                        if not self._left:
                            return []
                        self._left -= 1
                        self._connection = self._opened()
                    return self._connection.execute(statement, values).fetchall()
                except (sqlite3.Error, OSError, UnicodeError) as error:
                    _logger.debug("%s: %s", self._path, error)
                    if not self._is_damaged(error):
                        return []
                    self._replace()

    def _opened(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The lock above lets one thread at a time use it.
        connection = sqlite3.connect(
            self._path, timeout=_LOCKED_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute(
                "PRAGMA synchronous = OFF"
            )  # a power cut may cost what is remembered
            connection.execute(_CREATE)
            connection.execute(
                "DELETE FROM files WHERE written < ?", (int(time.time()) - _KEPT_SECONDS,)
            )
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _is_damaged(self, error: Exception) -> bool:
        """Return whether it is the file that is wrong, and not that it is locked or out of reach."""
        return isinstance(error, sqlite3.DatabaseError) and not isinstance(
            error, sqlite3.OperationalError
        )

    def _replace(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for path in (self._path, self._path.with_name(f"{self._path.name}-journal")):
            with contextlib.suppress(OSError):
                path.unlink()


def _seal(*values: str) -> str:
    return hashlib.blake2b(
        "\0".join(values).encode(errors="surrogateescape"), digest_size=8
    ).hexdigest()
