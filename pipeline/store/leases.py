"""Leases: of all runs on one store, one at a time works on a key, and another takes over when it died.

    <storage>/<stage>-<key>/_LEASE.1.json    who works on it, renewed while it does
    <storage>/<stage>-<key>/_LEASE.2.json    who took over; the highest number holds

A file is made exclusively, so of several that want a key one gets it. A lease whose holder runs on this
machine lasts exactly as long as that process; any other one for as long as its file changes, watched by
the waiting process's own clock, so that clocks need not agree.

A storage library raises what it likes (botocore's errors are no OSError), and what asks for progress may
hang: neither ends a lease. It is lost only to another run that took over.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.errors import error_text
from pipeline.storage.filesystems import is_local, open_storage
from pipeline.storage.records import DamagedRecordError, create_record, put_record, read_record

RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0

_PREFIX, _SUFFIX = "_LEASE.", ".json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that works on something.

    Attributes:
        host: its machine's name, for people.
        machine: what tells one boot of one machine, and one container on it, from others.
        pid: its number there.
        started: clock ticks from the machine's boot to its start: numbers are used again.
    """

    host: str
    machine: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> Self:
        """Return this process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(), machine=_machine(), pid=pid, started=_start_of(pid) or 0
        )

    def is_gone(self) -> bool | None:
        """Return whether the process has ended; None if it runs on a machine that cannot be asked."""
        if self.machine != _machine():
            return None
        return _start_of(self.pid) != self.started


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What a lease file says.

    Attributes:
        number: of the file; the highest of a key counts.
        holder: who works on the key; None if the file is gone by now, or damaged.
        renewed: how often it was renewed.
        progress: the newest record of the work.
        token: of the folder object that made it, until it is renewed.
        damage: what is wrong with the file.
    """

    number: int
    holder: Holder | None = None
    renewed: int = -1
    progress: dict[str, Any] | None = None
    token: str | None = None
    damage: DamagedRecordError | None = None

    @property
    def is_held(self) -> bool:
        """Whether someone works on the key, as far as this machine can know."""
        return not (self.holder is not None and self.holder.is_gone())

    @property
    def may_be_dead(self) -> bool:
        """Whether only time tells: its holder is unknown, or on a machine that cannot be asked."""
        return self.holder is None or self.holder.is_gone() is None

    def __str__(self) -> str:
        if self.damage is not None:
            return "another run, whose lease is damaged"
        return f"process {self.holder.pid} on {self.holder.host}" if self.holder else "another run"


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What a lease file holds: see `Lease`."""

    holder: Holder
    renewed: int
    progress: dict[str, Any] | None
    token: str | None = None


class LeaseLostError(RuntimeError):
    """Another process took over, because this one's lease expired."""


class LeaseFolder:
    """The leases on one key.

    Args:
        url: the key's folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._token = uuid.uuid4().hex
        self._fs, self._root = open_storage(url)

    def newest(self) -> Lease | None:
        """Return the lease that counts, or None where there is none."""
        number = max(self._numbers(), default=0)
        if number == 0:
            return None
        try:
            found = read_record(self._fs, self._path(number), _Content, needs_checksum=True)
        except DamagedRecordError as error:
            return Lease(number=number, damage=error)
        if found is None:  # just given back
            return Lease(number=number)
        return Lease(number=number, **vars(found))

    def create(self, number: int) -> bool:
        """Make the lease of a number this process's; False if there is one already."""
        content = _Content(holder=Holder.current(), renewed=0, progress=None, token=self._token)
        return create_record(self._fs, self._path(number), content)

    def made(self, lease: Lease) -> bool:
        """Return whether `create` of this object made a lease, even if the answer was lost on its way."""
        return lease.token == self._token

    def renew(self, number: int, renewed: int, progress: dict[str, Any] | None) -> None:
        """Show that this process is still at work.

        Raises:
            LeaseLostError: if another one took over or the lease is gone.
        """
        if max(self._numbers(), default=0) != number:
            raise LeaseLostError(f"{self.url}: another run took over")
        content = _Content(holder=Holder.current(), renewed=renewed, progress=progress)
        put_record(self._fs, self._path(number), content)

    def give_back(self, number: int) -> None:
        """Delete the leases up to a number."""
        for old in self._numbers():
            if old <= number:
                self._fs.rm(self._path(old))

    def name_of(self, number: int) -> str:
        """Return the name of a lease's file."""
        return f"{_PREFIX}{number}{_SUFFIX}"

    def _path(self, number: int) -> str:
        return f"{self._root}/{self.name_of(number)}"

    def _numbers(self) -> list[int]:
        if is_local(self._fs):
            folder = Path(self._root)
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        else:
            try:
                names = [str(p).rpartition("/")[2] for p in self._fs.ls(self._root, detail=False)]
            except FileNotFoundError:
                names = []
        middles = (
            name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            for name in names
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX)
        )
        return [int(middle) for middle in middles if middle.isdecimal()]


class HeldLease:
    """A lease of this process, renewed by a thread of its own until it is given back.

    Args:
        folder: the key's leases.
        number: of the one that is held.
        on_lost: called, from that thread, if another process took over.
        progress: gives the newest record of the work; called from another thread, where it may hang.
    """

    def __init__(
        self,
        folder: LeaseFolder,
        number: int,
        *,
        on_lost: Callable[[LeaseLostError], None],
        progress: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self._folder, self._number = folder, number
        self._on_lost, self._progress = on_lost, progress
        self._record: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._watcher.start()

    def give_back(self) -> None:
        """Let others work on the key, as far as storage can be reached: what was done is done."""
        self._stop.set()
        self._thread.join(timeout=RENEW_SECONDS)
        self._watcher.join(timeout=1.0)  # what it asks is gone next, unless it hangs
        try:
            self._folder.give_back(self._number)
        except Exception as error:  # noqa: BLE001  # every storage raises its own
            _logger.warning(
                "%s: the lease could not be deleted (%s); other runs wait until this process ends, those "
                "on other machines for %.0f s",
                self._folder.url,
                error_text(error),
                STALE_SECONDS,
            )

    def _renew(self) -> None:
        renewed, is_away = 0, False
        while not self._stop.wait(RENEW_SECONDS):
            renewed += 1
            try:
                self._folder.renew(self._number, renewed, self._record)
                is_away = False
            except LeaseLostError as error:
                self._on_lost(error)
                return
            except Exception as error:  # noqa: BLE001  # every storage raises its own
                if not is_away:  # perhaps only for a moment: the next time tells
                    text = "%s: the lease could not be renewed (%s); it is tried again every %.0f s"
                    _logger.warning(text, self._folder.url, error_text(error), RENEW_SECONDS)
                is_away = True

    def _watch(self) -> None:
        """Keep the newest record of the work; the lease is renewed without one, or with an old one."""
        while True:
            try:
                self._record = self._progress()
            except Exception as error:  # noqa: BLE001  # whoever knows of it may be gone
                _logger.debug("%s: no progress: %s", self._folder.url, error_text(error))
            if self._stop.wait(RENEW_SECONDS):
                return


class LeaseWatch:
    """Watches a key's lease until it can be had.

    Args:
        url: the key's folder.
    """

    def __init__(self, url: str) -> None:
        self.folder = LeaseFolder(url)
        self._seen: Lease | None = None
        self._since = time.monotonic()

    def holding(self) -> Lease | None:
        """Return the lease of who has the key, or None where it can be taken."""
        newest = self.folder.newest()
        return None if newest is None or self._is_stale(newest) else newest

    def take(self) -> int | Lease:
        """Return the number of the lease that is this process's now, or the lease of who has it."""
        newest = self.folder.newest()
        if newest is not None and (self.folder.made(newest) or not self._is_stale(newest)):
            return self._number_or_lease(newest)
        number = 1 if newest is None else newest.number + 1
        if self.folder.create(number):
            return number
        return self._number_or_lease(self.folder.newest() or Lease(number=0))

    def _number_or_lease(self, newest: Lease) -> int | Lease:
        return newest.number if self.folder.made(newest) else newest

    def _is_stale(self, newest: Lease) -> bool:
        gone = newest.holder.is_gone() if newest.holder else None
        if gone is not None:
            return gone
        now = time.monotonic()
        if self._seen is None or (self._seen.number, self._seen.renewed) != (
            newest.number,
            newest.renewed,
        ):
            self._seen, self._since = newest, now
        return now - self._since > STALE_SECONDS


def _machine() -> str:
    """Name this boot of this machine and, in a container, its own processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"


def _start_of(pid: int) -> int | None:
    """Return when a process of this machine started, in ticks since boot; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
