"""What a store holds: listed, cleared, checked; on a folder and on S3."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.store.artifacts import ArtifactStore
from pipeline.store.leases import Holder, LeaseFolder
from pipeline.store.maintenance import entries, garbage, problems_of
from pipeline.store.storage import open_storage, put_json

KEY = "0123456789abcdef"


@pytest.fixture
def store(url):
    return ArtifactStore(url)


def begin(store, stage="prune", key=KEY):
    attempt = store.begin(stage, key, {"lr": 1.0}, {})
    (attempt.folder / "model").mkdir()
    (attempt.folder / "model" / "weights.bin").write_bytes(bytes(1000))
    (attempt.folder / "note.txt").write_text("a")
    return attempt


def write(store, path, data=b"x" * 10):
    filesystem, root = open_storage(store.url)
    filesystem.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    filesystem.pipe_file(f"{root}/{path}", data)


def names(store):
    filesystem, root = open_storage(store.url)
    return {str(path)[len(root) + 1 :].partition("/")[2] for path in filesystem.find(root)}


def clear(store, days=7.0):
    for entry in entries(store):
        for item in garbage(entry, older_than_days=days):
            store.discard(item.url)


def test_an_empty_store(store):
    assert list(entries(store)) == []


def test_what_is_there(store):
    begin(store).commit({"accuracy": 1.0}, 1.0)
    write(store, f"dense-{KEY}/checkpoints/step-00000010-aaaaaa/weights.bin")
    LeaseFolder(store.folder_of("evaluate", KEY)).create(1)
    write(store, "a-folder/of-something-else")
    found = {entry.stage: entry for entry in entries(store)}
    assert {name: entry.state for name, entry in found.items()} == {
        "prune": "done",
        "dense": "unfinished",
        "evaluate": "running",
    }
    assert found["prune"].size > 1001  # the manifest too
    assert found["dense"].size == 10
    assert found["evaluate"].lease.holder == Holder.current()
    for entry in found.values():
        assert abs(datetime.now(UTC) - entry.changed) < timedelta(minutes=10)


def test_clearing_keeps_what_is_done(store):
    given_up = begin(store)
    store.upload(given_up.folder, given_up.url)
    done = begin(store).commit({}, 1.0)
    write(store, f"prune-{KEY}/checkpoints/step-00000010-aaaaaa/weights.bin")
    (entry,) = entries(store)
    assert sum(item.size for item in garbage(entry, older_than_days=7)) == 1011
    clear(store)
    attempt = done.url.rpartition("/")[2]
    assert names(store) == {"_DONE.json", f"{attempt}/model/weights.bin", f"{attempt}/note.txt"}
    (entry,) = entries(store)
    assert problems_of(entry) == []


def test_clearing_keeps_the_checkpoints_of_what_was_begun_of_late(store):
    given_up = begin(store)
    store.upload(given_up.folder, given_up.url)
    checkpoint = "checkpoints/step-00000010-aaaaaa/weights.bin"
    write(store, f"prune-{KEY}/{checkpoint}")
    clear(store)
    assert names(store) == {checkpoint}
    clear(store, days=0.0)
    assert names(store) == set()


def test_clearing_keeps_off_what_someone_works_on(store):
    given_up = begin(store)
    store.upload(given_up.folder, given_up.url)
    folder = LeaseFolder(store.folder_of("prune", KEY))
    folder.create(1)
    before = names(store)
    clear(store)
    assert names(store) == before

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = replace(Holder.current(), pid=process.pid, started=0)
    process.communicate(b"\n", timeout=30)
    filesystem, root = open_storage(folder.url)
    gone = {"holder": vars(holder), "renewed": 0, "progress": None}
    put_json(filesystem, f"{root}/_LEASE.1.json", gone)
    clear(store)
    assert names(store) == set()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda fs, path: fs.pipe_file(path, bytes(999)), "has 999 bytes, not 1000"),
        (lambda fs, path: fs.pipe_file(path, b"1" + bytes(999)), "has another checksum"),
        (lambda fs, path: fs.rm(path), "is missing"),
    ],
)
def test_damage_is_found(store, damage, complaint):
    artifact = begin(store).commit({}, 1.0)
    filesystem, root = open_storage(artifact.url)
    damage(filesystem, f"{root}/model/weights.bin")
    (entry,) = entries(store)
    (problem,) = problems_of(entry)
    assert problem == f"{artifact.url}/model/weights.bin {complaint}"


def test_an_upload_cut_short_is_not_done(store):
    attempt = begin(store)
    store.upload(attempt.folder, attempt.url)
    filesystem, root = open_storage(store.folder_of("prune", KEY))
    filesystem.pipe_file(f"{root}/_DONE.json", b'{"stage": "pru')
    assert store.find("prune", KEY) is None
    (entry,) = entries(store)
    assert entry.state == "unfinished"
