"""What several runs want is made by one of them; the others wait and take it."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from launch.driver import locking
from launch.driver.locking import made_once
from pipeline.errors import StageError
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.leases import LeaseFolder

PAGE = PlannedStage(
    name="campaign", key="0123456789abcdef", params={"a": 1}, inputs=(), on_all_workers=False
)


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path))


def test_while_one_run_makes_it_another_waits(store, tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "_POLL_SECONDS", 0.02)
    is_making, is_waited_for = threading.Event(), threading.Event()
    told, made = [], []

    def make(folder):
        made.append(folder)
        is_making.set()
        assert is_waited_for.wait(30), "nobody waited"
        (folder / "page").write_text("whole")
        return {"cells": 4}

    def tell(text):
        told.append(text)
        is_waited_for.set()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made_once, PAGE, store, make, tell=tell)
        assert is_making.wait(30)
        second = pool.submit(made_once, PAGE, store, make, tell=tell)
        artifact = first.result(timeout=30)
        assert second.result(timeout=30) == artifact
    assert len(made) == 1
    (text,) = told
    assert text.startswith("campaign  waiting for process ")
    assert text.endswith(", which is working on it")
    assert (artifact.metrics, artifact.params) == ({"cells": 4}, {"a": 1})
    assert (artifact.path / "page").read_text() == "whole"
    assert sorted(p.name for p in (tmp_path / "campaign-0123456789abcdef").iterdir()) == [
        "_DONE.json",
        made[0].name,
    ]


def test_what_failed_is_made_by_the_next_one(store):
    def fail(folder):
        raise OSError(f"{folder}: no space left")

    with pytest.raises(OSError, match="no space left"):
        made_once(PAGE, store, fail, tell=print)
    assert store.find(PAGE.name, PAGE.key) is None
    artifact = made_once(PAGE, store, lambda folder: {"cells": 4}, tell=print)
    assert made_once(PAGE, store, fail, tell=print) == artifact


CLIENT_ERROR = ClientError({"Error": {"Code": "Throttling", "Message": "later"}}, "ListObjectsV2")
OF_STORAGE = [CLIENT_ERROR, EndpointConnectionError(endpoint_url="http://127.0.0.1:9")]


def away(monkeypatch, num_times, error):
    """Let the first looks at leases fail as a storage library fails."""
    real, left = LeaseFolder.newest, [error] * num_times

    def newest(self):
        if left:
            raise left.pop()
        return real(self)

    monkeypatch.setattr(LeaseFolder, "newest", newest)


@pytest.mark.parametrize("error", OF_STORAGE, ids=lambda error: type(error).__name__)
def test_a_run_waits_for_storage_that_is_away(store, monkeypatch, error):
    monkeypatch.setattr(locking, "_POLL_SECONDS", 0.01)
    away(monkeypatch, 3, error)
    told = []
    assert made_once(PAGE, store, lambda folder: {"cells": 4}, tell=told.append).metrics["cells"]
    (text,) = told
    assert text.startswith(f"campaign  waiting for {store.url}: {type(error).__name__}: ")


def test_a_run_gives_up_on_storage_that_stays_away(store, monkeypatch):
    monkeypatch.setattr(locking, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(locking, "_AWAY_SECONDS", 0.05)
    away(monkeypatch, 1000, CLIENT_ERROR)
    with pytest.raises(StageError, match=r"could not be reached .* ClientError.*same command"):
        made_once(PAGE, store, lambda folder: {}, tell=print)


@pytest.mark.parametrize("error", [TypeError("a mistake"), OSError(errno.EROFS, "read-only")])
def test_what_no_wait_mends_is_raised_at_once(store, monkeypatch, error):
    away(monkeypatch, 1000, error)
    with pytest.raises(type(error)):
        made_once(PAGE, store, lambda folder: {}, tell=print)


def test_a_lease_that_cannot_be_deleted_does_not_undo_what_was_made(store, monkeypatch, caplog):
    def give_back(self, number):
        raise CLIENT_ERROR

    monkeypatch.setattr(LeaseFolder, "give_back", give_back)
    assert made_once(PAGE, store, lambda folder: {"cells": 4}, tell=print).metrics == {"cells": 4}
    assert "could not be deleted (ClientError" in caplog.text
