"""Leases: one holder at a time, taken over from the dead and from nobody else."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from pipeline.storage.filesystems import open_storage
from pipeline.store import leases
from pipeline.store.leases import HeldLease, Holder, Lease, LeaseFolder, LeaseLostError, LeaseWatch
from tests.object_storage import s3_server, s3_server_away


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
    watch, since = LeaseWatch(url), time.monotonic()
    taken = watch.take()
    assert str(taken) == "another run, whose lease is damaged"
    while isinstance(watch.take(), Lease):
        assert time.monotonic() - since < 30
        time.sleep(0.05)
    assert time.monotonic() - since >= 0.6


CLIENT_ERROR = ClientError({"Error": {"Code": "Throttling", "Message": "later"}}, "PutObject")
OF_STORAGE = [
    CLIENT_ERROR,
    EndpointConnectionError(endpoint_url="http://127.0.0.1:9"),
    OSError("the server is away"),
]


def wait_for(condition):
    since = time.monotonic()
    while not condition():
        assert time.monotonic() - since < 30
        time.sleep(0.02)


@pytest.mark.parametrize("error", OF_STORAGE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("operation", ["pipe_file", "ls"])
def test_a_lease_survives_what_a_storage_library_raises(
    bucket, tmp_path, fast, monkeypatch, caplog, error, operation
):
    watch = LeaseWatch(f"{bucket}/{tmp_path.name}")
    number = watch.take()
    filesystem, _ = open_storage(watch.folder.url)
    real, is_away, num_failed = getattr(filesystem, operation), True, 0

    def flaky(*args, **kwargs):
        nonlocal num_failed
        if is_away:
            num_failed += 1
            raise error
        return real(*args, **kwargs)

    lost = []
    monkeypatch.setattr(filesystem, operation, flaky)
    held = HeldLease(watch.folder, number, on_lost=lost.append, progress=lambda: {"step": 7})
    wait_for(lambda: num_failed >= 3)
    is_away = False
    wait_for(lambda: watch.folder.newest().renewed > num_failed)
    assert watch.folder.newest().progress == {"step": 7}
    held.give_back()
    assert (lost, watch.folder.newest()) == ([], None)
    (record,) = [record for record in caplog.records if record.name == leases.__name__]
    assert f"could not be renewed ({type(error).__name__}" in record.getMessage()


@pytest.mark.slow
def test_a_lease_survives_a_server_that_is_restarted(fast, monkeypatch, tmp_path):
    with s3_server(monkeypatch) as url:
        watch = LeaseWatch(f"{url}/{tmp_path.name}")
        lost = []
        held = HeldLease(watch.folder, watch.take(), on_lost=lost.append)
        wait_for(lambda: watch.folder.newest().renewed)
        with s3_server_away():
            with pytest.raises(EndpointConnectionError):
                watch.folder.newest()
            before = held._thread
            time.sleep(0.5)
        renewed = watch.folder.newest().renewed
        wait_for(lambda: watch.folder.newest().renewed > renewed)
        assert before.is_alive()
        held.give_back()
        assert (lost, watch.folder.newest()) == ([], None)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "raises"])
def test_a_lease_is_renewed_while_a_progress_call_hangs_or_fails(url, fast, how):
    asked, answer = threading.Event(), threading.Event()

    def progress():
        asked.set()
        if how == "raises":
            raise RuntimeError("the actor is gone")
        answer.wait()  # for longer than a lease lasts

    watch = LeaseWatch(url)
    lost = []
    held = HeldLease(watch.folder, watch.take(), on_lost=lost.append, progress=progress)
    assert asked.wait(30)
    wait_for(lambda: watch.folder.newest().renewed * leases.RENEW_SECONDS > leases.STALE_SECONDS)
    held.give_back()
    answer.set()
    assert (lost, watch.folder.newest()) == ([], None)


def test_a_lease_that_cannot_be_given_back_is_no_failure(bucket, tmp_path, monkeypatch, caplog):
    watch = LeaseWatch(f"{bucket}/{tmp_path.name}")
    held = HeldLease(watch.folder, watch.take(), on_lost=print)
    filesystem, _ = open_storage(watch.folder.url)
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "rm", raising(CLIENT_ERROR))
        held.give_back()
    assert "the lease could not be deleted (ClientError" in caplog.text
    assert watch.folder.newest().number == 1


@pytest.mark.parametrize("error", [*OF_STORAGE, FileExistsError("made by the first of two tries")])
def test_a_lease_whose_answer_was_lost_is_its_makers(bucket, tmp_path, monkeypatch, error):
    """A library tries a conditional put again: what it meets then may be its own."""
    watch = LeaseWatch(f"{bucket}/{tmp_path.name}")
    filesystem, _ = open_storage(watch.folder.url)
    real = filesystem.pipe_file

    def written_but_not_answered(*args, **kwargs):
        real(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "pipe_file", written_but_not_answered)
        if not isinstance(error, FileExistsError):
            with pytest.raises(type(error)):
                watch.take()
    assert watch.take() == 1
    assert isinstance(LeaseWatch(watch.folder.url).take(), Lease)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call
