"""What several runs want is made by one of them; the others wait and take it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.driver import locking
from launch.driver.locking import made_once
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import ArtifactStore

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
