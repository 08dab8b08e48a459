"""Where parts of unfinished work lie on this machine, and which of them are of no use."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.store.artifacts import ArtifactStore
from pipeline.store.leases import LeaseFolder
from pipeline.store.maintenance import Limits, clear
from pipeline.store.parts import abandoned_parts, discard_parts, parts_folder

KEYS = [f"{i:016x}" for i in range(4)]
DAY = 86400


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def store(url):
    return ArtifactStore(url)


def make(store, key, age_days=0.0):
    part = parts_folder(store, "data", key) / "tokenize" / "train" / "a.arrow"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(10))
    os.utime(part, (time.time() - age_days * DAY,) * 2)
    return parts_folder(store, "data", key)


def finish(store, key):
    attempt = store.begin("data", key, {}, {})
    (attempt.folder / "rows").write_text("a")
    attempt.commit({}, 1.0)


def found(store, days):
    """What gc would delete of parts: those in the store, and those beside a remote one."""
    urls = [item.url for item in clear(store, Limits(older_than_days=days), dry_run=True)]
    return {Path(url).parent.name if Path(url).name == "parts" else Path(url).name for url in urls}


def test_parts_of_done_and_of_old_work_are_found_and_those_of_live_work_are_not(store):
    folders = [make(store, KEYS[0]), make(store, KEYS[1], age_days=10), make(store, KEYS[2])]
    finish(store, KEYS[0])
    assert found(store, 7.0) == {f"data-{KEYS[0]}", f"data-{KEYS[1]}"}
    assert found(store, 30.0) == {f"data-{KEYS[0]}"}
    for path, _, _ in abandoned_parts(store, older_than_days=7.0):
        store.discard(str(path))
        assert not path.exists()
    discard_parts(folders[2])
    discard_parts(folders[2])  # twice is as good
    assert not folders[2].exists()


def test_parts_of_a_key_that_is_held_stay(bucket, tmp_path):
    store = ArtifactStore(f"{bucket}/{tmp_path.name}")
    make(store, KEYS[3], age_days=10)
    LeaseFolder(store.folder_of("data", KEYS[3])).create(1)
    assert list(abandoned_parts(store, older_than_days=7.0)) == []


def test_stores_do_not_share_parts(bucket, tmp_path):
    one, other = (ArtifactStore(f"{bucket}/{name}") for name in ("one", "other"))
    assert parts_folder(one, "data", KEYS[0]) != parts_folder(other, "data", KEYS[0])
    make(one, KEYS[0], age_days=10)
    assert len(list(abandoned_parts(one, older_than_days=7.0))) == 1
    assert list(abandoned_parts(other, older_than_days=7.0)) == []
