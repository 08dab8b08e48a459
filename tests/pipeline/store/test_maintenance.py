"""What a store holds: listed, cleared, checked; on a folder and on S3."""

import hashlib
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.errors import ConfigError
from pipeline.storage.filesystems import open_storage
from pipeline.storage.records import FailureNote, HardwareChoice, put_record
from pipeline.store import leases, maintenance, verification
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.checkpoints import CheckpointStore
from pipeline.store.leases import Holder, LeaseFolder, LeaseWatch
from pipeline.store.maintenance import (
    Limits,
    clear,
    damaged_choices,
    discard_damaged,
    entries,
    existing_store,
    garbage,
)
from pipeline.store.verification import verified
from pipeline.worker_group import WorkerGroup

KEY = "0123456789abcdef"


@pytest.fixture
def store(url):
    return ArtifactStore(url)


@pytest.fixture
def local_store(tmp_path):
    """A store in a folder, where what is tried does not depend on where it is."""
    return ArtifactStore(str(tmp_path / "storage"))


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


def checkpoint(store, step, stage="prune"):
    """Keep a checkpoint as a run does."""
    folder = f"{store.folder_of(stage, KEY)}/checkpoints"
    kept = CheckpointStore(folder, WorkerGroup.alone())
    kept.save(lambda files: files.put("weights.bin", bytes(10)), step)
    return kept


def cleared(store, days=7.0, **limits):
    return list(clear(store, Limits(older_than_days=days, **limits)))


@pytest.fixture
def fast(monkeypatch):
    """A minute is half a second."""
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(maintenance, "_POLL_SECONDS", 0.05)


@pytest.fixture
def far_away(monkeypatch):
    """Do as a process of a machine that cannot be asked."""

    def do(action):
        with monkeypatch.context() as patch:
            patch.setattr(leases, "_machine", lambda: "far away")
            return action()

    return do


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
    assert sum(item.size for item in garbage(entry, Limits())) == 1011
    assert sum(item.size for item in clear(store, Limits(), dry_run=True)) == 1011
    assert sum(item.size for item in cleared(store)) == 1011
    attempt = done.url.rpartition("/")[2]
    assert names(store) == {"_DONE.json", f"{attempt}/model/weights.bin", f"{attempt}/note.txt"}
    (entry,) = entries(store)
    assert verified(entry).damage == {}
    assert cleared(store, days=0.0) == []


@pytest.mark.parametrize("part", ["", "layer-00003/"])
def test_what_a_run_can_resume_from_stays_whatever_its_age(store, part):
    given_up = begin(store)
    store.upload(given_up.folder, given_up.url)
    kept = checkpoint(store, 10) if not part else None
    if part:
        url = f"{store.folder_of('prune', KEY)}/checkpoints"
        layer = CheckpointStore(url, WorkerGroup.alone()).part("layer-00003")
        layer.save(lambda files: files.put("weights.bin", bytes(10)), 3)
    cleared(store, days=0.0)
    left = names(store)
    assert {name.rpartition("/")[2] for name in left} == {"_DONE.json", "weights.bin"}
    assert all(name.startswith(f"checkpoints/{part}step-000000") for name in left)
    if kept:
        assert kept.restore(lambda saved: saved.manifest.step) == 10
    (entry,) = entries(store)
    assert entry.can_resume
    assert cleared(store, days=7.0, checkpoints=True) == []
    cleared(store, days=0.0, checkpoints=True)
    assert names(store) == set()


def test_a_checkpoint_that_no_run_can_resume_from_goes_with_age(store):
    write(store, f"prune-{KEY}/checkpoints/step-00000010-aaaaaa/weights.bin")  # never complete
    write(store, f"dense-{KEY}/checkpoints/step-00000010-aaaaaa/_DONE.json", b"{}")
    found = {entry.stage: entry for entry in entries(store)}
    assert not any(entry.can_resume for entry in found.values())
    assert list(found["dense"].damage) == ["checkpoints/step-00000010-aaaaaa/_DONE.json"]
    before = names(store)
    assert cleared(store) == []
    assert names(store) == before
    cleared(store, days=0.0)
    assert names(store) == set()


def test_clearing_keeps_off_what_a_process_of_this_machine_works_on(store):
    given_up = begin(store)
    store.upload(given_up.folder, given_up.url)
    checkpoint(store, 10)
    folder = LeaseFolder(store.folder_of("prune", KEY))
    folder.create(1)
    before = names(store)
    for dry_run in (True, False):
        limits = Limits(older_than_days=0.0, checkpoints=True)
        assert list(clear(store, limits, dry_run=dry_run)) == []
    assert names(store) == before

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = replace(Holder.current(), pid=process.pid, started=0)
    process.communicate(b"\n", timeout=30)
    filesystem, root = open_storage(folder.url)
    gone = leases._Content(holder=holder, renewed=0, progress=None)
    put_record(filesystem, f"{root}/_LEASE.1.json", gone)
    cleared(store, days=0.0, checkpoints=True)
    assert names(store) == set()


def test_clearing_watches_the_leases_of_other_machines(store, fast, far_away):
    """Whose clock is right does not matter: who renews is alive."""
    alive, dead = (LeaseFolder(store.folder_of(stage, KEY)) for stage in ("dense", "prune"))
    for stage, folder in (("dense", alive), ("prune", dead)):
        write(store, f"{stage}-{KEY}/a-0123456789ab/weights.bin")
        assert far_away(lambda folder=folder: folder.create(1))
    stop, told = threading.Event(), []

    def renew():
        count = 0
        while not stop.wait(0.1):
            count += 1
            content = leases._Content(holder=far, renewed=count, progress=None)
            put_record(filesystem, f"{root}/_LEASE.1.json", content)

    filesystem, root = open_storage(alive.url)
    far = alive.newest().holder
    assert far.is_gone() is None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(renew)
        try:
            found = list(clear(store, Limits(older_than_days=0.0), tell=told.append))
        finally:
            stop.set()
    assert {item.url.removeprefix(f"{dead.url}/") for item in found} == {
        "a-0123456789ab",
        "_LEASE.1.json",
    }
    assert names(store) == {"a-0123456789ab/weights.bin", "_LEASE.1.json"}
    assert alive.newest().renewed > 0
    assert told == ["watching for a minute whether leases of other machines are renewed: 2"]


def test_a_run_that_begins_while_a_store_is_cleared_waits(store, monkeypatch):
    given_up = begin(store)
    store.upload(given_up.folder, given_up.url)
    real, seen = ArtifactStore.discard, []

    def discard(self, url):
        seen.append(LeaseWatch(self.folder_of("prune", KEY)).take())
        real(self, url)

    monkeypatch.setattr(ArtifactStore, "discard", discard)
    cleared(store)
    assert [lease.holder for lease in seen] == [Holder.current()]
    assert names(store) == set()
    assert LeaseWatch(store.folder_of("prune", KEY)).take() == 1


def test_what_a_run_begins_after_the_listing_is_kept(store, monkeypatch):
    given_up = begin(store)
    store.upload(given_up.folder, given_up.url)
    real = LeaseWatch.take

    def take(self):
        LeaseFolder(self.folder.url).create(1)  # a run is faster
        return real(self)

    monkeypatch.setattr(LeaseWatch, "take", take)
    before = names(store)
    assert cleared(store, days=0.0) == []
    assert names(store) == before | {"_LEASE.1.json"}


def test_what_only_looks_like_ours_is_left_alone(store):
    """Folders named as keys are, and files that someone put into a key's folder."""
    write(store, f"thesis-{KEY}/chapter-1.tex")
    write(store, f"photos-{KEY}/a-summer/beach.jpg")
    write(store, f"model-{KEY}/checkpoints/best/weights.bin")
    theirs = names(store)
    write(store, f"dense-{KEY}/a-0123456789ab/weights.bin")
    write(store, f"dense-{KEY}/checkpoints/step-00000010-aaaaaa/weights.bin")
    write(store, f"dense-{KEY}/checkpoints/why.txt")
    write(store, f"dense-{KEY}/notes/why.txt")
    (entry,) = entries(store)
    assert (entry.stage, entry.size) == ("dense", 20)
    cleared(store, days=0.0, checkpoints=True)
    assert names(store) == theirs | {"checkpoints/why.txt", "notes/why.txt"}
    assert list(entries(store)) == []


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
    shows = complaint != "has another checksum"  # without its files being read
    assert entry.state == ("damaged" if shows else "done")
    (problem,) = verified(entry).damage_texts
    where = " is damaged: model/weights.bin" if shows else "/model/weights.bin"
    assert problem == f"{artifact.url}{where} {complaint}"
    assert cleared(store, days=0.0) == []
    assert list(discard_damaged(store, [verified(entry)], print))
    assert names(store) == set()


def flip_a_bit(data):
    return data[:7] + bytes([data[7] ^ 4]) + data[8:]


@pytest.mark.parametrize("part", ["", "layer-00003/"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (flip_a_bit, "has another checksum"),
        (lambda data: data[:-1], "has 999 bytes, not 1000"),
        (lambda data: None, "is missing"),
    ],
)
def test_a_damaged_shard_of_a_checkpoint_is_named_and_that_checkpoint_goes(
    store, part, damage, complaint
):
    kept = CheckpointStore(
        f"{store.folder_of('prune', KEY)}/checkpoints/{part}".rstrip("/"), WorkerGroup.alone()
    )
    for step in (1, 2):
        kept.save(lambda files: [files.put(f"engine/{i}.bin", bytes(1000)) for i in range(3)], step)
    (whole,) = entries(store)
    assert len(whole.checkpoints) == 2
    assert verified(whole).damage == {}
    folder = max(whole.checkpoints)
    filesystem, root = open_storage(whole.url)
    path = f"{root}/{folder}/engine/1.bin"
    after = damage(filesystem.cat_file(path))
    filesystem.rm(path)
    if after is not None:
        filesystem.pipe_file(path, after)
    (entry,) = entries(store)
    assert entry.damage == {}
    assert verified(entry).damage_texts == [f"{entry.url}/{folder}/engine/1.bin {complaint}"]
    assert list(discard_damaged(store, [verified(entry)], print))
    (left,) = entries(store)
    assert left.checkpoints == [min(whole.checkpoints)]
    assert left.can_resume
    assert verified(left).damage == {}


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_damaged(store, monkeypatch):
    kept = checkpoint(store, 1)
    (entry,) = entries(store)
    look = verification._differences

    def delete_and_look(*given):
        kept.discard()
        return look(*given)

    monkeypatch.setattr(verification, "_differences", delete_and_look)
    assert verified(entry).damage == {}
    (text,) = look(*open_storage(f"{entry.url}/{entry.checkpoints[0]}"), {"weights.bin": {}}, "x")
    assert text == "x/weights.bin"


DAMAGE = [
    b"",
    b"[]",
    b"5",
    b"null",
    b'{"foo": 1}',
    b"{}",
    b'{"stage": "pru',
    b"\xff\xfe\x00",
    b"[" * 9999,
]


@pytest.mark.parametrize("raw", DAMAGE, ids=lambda raw: repr(raw[:12]))
@pytest.mark.parametrize(
    "name",
    ["_DONE.json", "_FAILED.json", "_LEASE.1.json", "checkpoints/step-00000010-aaaaaa/_DONE.json"],
)
def test_one_damaged_file_is_listed_and_the_rest_works(local_store, name, raw, fast):
    good = begin(local_store, "dense").commit({"accuracy": 1.0}, 1.0)
    write(local_store, f"prune-{KEY}/{name}", raw)
    write(local_store, f"prune-{KEY}/a-0123456789ab/weights.bin")
    found = {entry.stage: entry for entry in entries(local_store)}
    assert found["dense"].artifact == good
    assert list(found["prune"].damage) == [name]
    (text,) = found["prune"].damage_texts
    assert text.startswith(f"{local_store.folder_of('prune', KEY)}/{name} is damaged: ")
    states = {"_DONE.json": "damaged", "_LEASE.1.json": "running"}
    assert found["prune"].state == states.get(name, "unfinished")
    assert local_store.find("prune", KEY) is None
    assert (local_store.failure("prune", KEY) is None) == (name != "_FAILED.json")
    if name == "_DONE.json":
        assert cleared(local_store, days=0.0) == []  # it may be mended
    list(discard_damaged(local_store, [found["prune"]], print))
    (entry,) = (
        (entry for entry in entries(local_store) if entry.stage == "prune")
        if (name != "_DONE.json")
        else [None]
    )
    assert entry is None or (entry.damage == {} and "a-0123456789ab/weights.bin" in entry.files)
    cleared(local_store, days=0.0)
    assert [entry.artifact for entry in entries(local_store)] == [good]


@pytest.mark.parametrize("raw", DAMAGE, ids=lambda raw: repr(raw[:12]))
def test_a_damaged_choice_is_listed(local_store, raw):
    filesystem, root = open_storage(local_store.url)
    filesystem.makedirs(f"{root}/auto", exist_ok=True)
    good = HardwareChoice(gpus_per_worker=1, precision="bf16")
    put_record(filesystem, f"{root}/auto/{'a' * 16}.json", good)
    assert damaged_choices(local_store) == []
    write(local_store, f"auto/{KEY}.json", raw)
    write(local_store, "auto/notes.txt", raw)
    (error,) = damaged_choices(local_store)
    assert error.url == f"{root}/auto/{KEY}.json"


def test_a_changed_note_is_damaged(store):
    store.note_failure("prune", KEY, "no space")
    filesystem, root = open_storage(store.folder_of("prune", KEY))
    text = filesystem.cat_file(f"{root}/_FAILED.json")
    filesystem.pipe_file(f"{root}/_FAILED.json", text.replace(b"no space", b"no spice"))
    (entry,) = entries(store)
    assert entry.damage == {
        "_FAILED.json": "is damaged: it was changed after it was written (another checksum)"
    }
    put_record(filesystem, f"{root}/_FAILED.json", FailureNote(reason="no space"))
    (entry,) = entries(store)
    assert entry.damage == {}


def test_what_is_no_store_is_refused(url, tmp_path):
    with pytest.raises(ConfigError, match=r"^storage: there is no store at .*, got "):
        existing_store(url)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^storage: .*/file is not a folder, got "):
        existing_store(str(tmp_path / "file"))
    write(ArtifactStore(url), f"dense-{KEY}/a-0123456789ab/weights.bin")
    assert len(list(entries(existing_store(url)))) == 1


# As the first mgpp wrote it: no checksum of its own, one sha256 a file, no lease.
OLD = {
    "stage": "prune",
    "key": KEY,
    "url": "a-0123456789ab",
    "seconds": 2.0,
    "files": {"weights.bin": {"bytes": 10, "sha256": hashlib.sha256(b"x" * 10).hexdigest()}},
    "metrics": {"accuracy": 0.5},
    "params": {"lr": 1.0},
    "inputs": {},
}


def test_an_old_store_is_read(store, fast):
    write(store, f"prune-{KEY}/a-0123456789ab/weights.bin")
    write(store, f"prune-{KEY}/_DONE.json", json.dumps(OLD).encode())
    lease = {"holder": {**vars(Holder.current()), "pid": 1}, "renewed": 1, "progress": None}
    write(store, f"dense-{KEY}/_LEASE.1.json", json.dumps(lease).encode())
    manifest = {"step": 10, "world_size": 1, "files": {"w": {"bytes": 10, "sha256": "", "rank": 0}}}
    step = f"dense-{KEY}/checkpoints/step-00000010-aaaaaa"
    write(store, f"{step}/_DONE.json", json.dumps(manifest).encode())
    write(store, f"{step}/w")
    found = {entry.stage: entry for entry in entries(store)}
    assert found["prune"].state == "done"
    assert found["prune"].artifact.metrics == {"accuracy": 0.5}
    assert verified(found["prune"]).damage == {}
    assert found["dense"].can_resume
    assert found["dense"].damage == {"_LEASE.1.json": "is damaged: has no checksum"}
    (item,) = clear(store, Limits(older_than_days=0.0), dry_run=True)
    assert item.url.endswith("/_LEASE.1.json")
    write(store, f"prune-{KEY}/a-0123456789ab/weights.bin", b"y" * 10)
    assert list(verified(found["prune"]).damage.values()) == ["has another checksum"]


def test_an_upload_cut_short_is_not_done(store):
    attempt = begin(store)
    store.upload(attempt.folder, attempt.url)
    filesystem, root = open_storage(store.folder_of("prune", KEY))
    filesystem.pipe_file(f"{root}/_DONE.json", b'{"stage": "pru')
    assert store.find("prune", KEY) is None
    (entry,) = entries(store)
    assert entry.state == "damaged"
