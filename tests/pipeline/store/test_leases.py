"""Leases: one holder at a time, taken over from the dead and from nobody else."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from pipeline.store import leases
from pipeline.store.leases import HeldLease, Holder, Lease, LeaseFolder, LeaseLostError, LeaseWatch
from pipeline.store.storage import open_storage, read_json


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.6)


def hold(url, taken, ended):
    number = LeaseWatch(url).take()
    taken.put(number if isinstance(number, int) else None)
    ended.wait(60)


@pytest.fixture
def elsewhere(url):
    """Start processes that hold the lease; all are gone afterwards."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start():
        taken, ended = context.Queue(), context.Event()
        process = context.Process(target=hold, args=(url, taken, ended), daemon=True)
        process.start()
        started.append(process)
        return process, taken.get(timeout=60)

    yield start
    for process in started:
        process.kill()
        process.join(timeout=10)


def test_one_holds_and_the_next_one_when_it_is_given_back(url):
    watch = LeaseWatch(url)
    assert watch.take() == 1
    taken = LeaseWatch(url).take()
    assert isinstance(taken, Lease)
    assert taken.holder == Holder.current()
    assert str(taken) == f"process {os.getpid()} on {Holder.current().host}"
    watch.folder.give_back(1)
    assert watch.folder.newest() is None
    assert LeaseWatch(url).take() == 1


def test_of_many_that_want_it_one_gets_it(url):
    got = []
    barrier = threading.Barrier(6)

    def want():
        watch = LeaseWatch(url)
        barrier.wait()
        got.append(watch.take())

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [taken for taken in got if isinstance(taken, int)] == [1]
    assert len(got) == 6


def test_a_killed_holder_of_this_machine_is_followed_at_once(elsewhere, url):
    process, number = elsewhere()
    assert number == 1
    taken = LeaseWatch(url).take()
    assert isinstance(taken, Lease)
    assert taken.holder.pid == process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=10)
    assert LeaseWatch(url).take() == 2
    assert isinstance(LeaseWatch(url).take(), Lease)


def test_a_number_used_by_another_process_does_not_keep_a_lease():
    holder = Holder.current()
    assert holder.is_gone() is False
    assert replace(holder, started=holder.started - 1).is_gone() is True
    assert replace(holder, machine="another boot").is_gone() is None


def far_away(url, monkeypatch):
    """A lease of a process on a machine that cannot be asked."""
    folder = LeaseFolder(url)
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_machine", lambda: "far away")
        assert folder.create(1)
    return folder


def test_a_silent_holder_elsewhere_is_followed_after_a_time(url, fast, monkeypatch):
    far_away(url, monkeypatch)
    watch, since = LeaseWatch(url), time.monotonic()
    while isinstance(watch.take(), Lease):
        assert time.monotonic() - since < 30
        time.sleep(0.05)
    assert time.monotonic() - since >= 0.6
    assert watch.folder.newest().number == 2


def test_a_holder_elsewhere_that_renews_keeps_it(url, fast, monkeypatch):
    folder = far_away(url, monkeypatch)
    watch, since, renewed = LeaseWatch(url), time.monotonic(), 0
    while time.monotonic() - since < 1.5:
        renewed += 1
        with monkeypatch.context() as patch:
            patch.setattr(leases, "_machine", lambda: "far away")
            folder.renew(1, renewed, {"step": renewed})
        assert isinstance(watch.take(), Lease)
        time.sleep(0.1)
    assert folder.newest().progress == {"step": renewed}


def test_a_held_lease_shows_progress_until_it_is_given_back(url, fast):
    watch = LeaseWatch(url)
    number = watch.take()
    lost = []
    held = HeldLease(watch.folder, number, on_lost=lost.append, progress=lambda: {"step": 7})
    since = time.monotonic()
    while watch.folder.newest().renewed < 3:
        assert time.monotonic() - since < 30
        time.sleep(0.05)
    assert watch.folder.newest().progress == {"step": 7}
    held.give_back()
    assert watch.folder.newest() is None
    assert lost == []


def test_who_was_taken_for_dead_is_told(url, fast):
    watch = LeaseWatch(url)
    number = watch.take()
    lost = threading.Event()
    held = HeldLease(watch.folder, number, on_lost=lambda error: lost.set())
    assert watch.folder.create(2)
    assert lost.wait(30)
    with pytest.raises(LeaseLostError, match="took over"):
        watch.folder.renew(number, 1, None)
    held.give_back()
    assert watch.folder.newest().number == 2


def test_a_lease_that_is_half_written_is_somebodys(url, fast):
    filesystem, root = open_storage(url)
    LeaseFolder(url).create(1)
    filesystem.pipe_file(f"{root}/_LEASE.1.json", b'{"hol')
    assert read_json(filesystem, f"{root}/_LEASE.1.json") is None
    watch, since = LeaseWatch(url), time.monotonic()
    taken = watch.take()
    assert str(taken) == "another run"
    while isinstance(watch.take(), Lease):
        assert time.monotonic() - since < 30
        time.sleep(0.05)
    assert time.monotonic() - since >= 0.6
