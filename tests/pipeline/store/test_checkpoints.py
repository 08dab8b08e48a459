"""Checkpoints are complete or ignored, a corrupt one is named and skipped, old ones go."""

import json
import threading
import time
import uuid

import fsspec
import pytest
import torch.distributed as dist

from pipeline.errors import StageError
from pipeline.store.checkpoint_manifest import newest_step
from pipeline.store.checkpoints import CheckpointStore
from pipeline.worker_group import WorkerGroup
from tests.disk import no_large_files


@pytest.fixture(scope="module")
def workers():
    """One real process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield WorkerGroup.current()
    dist.destroy_process_group()


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "kept") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def notes():
    return []


@pytest.fixture
def store(url, workers, notes):
    return CheckpointStore(url, workers, keep=2, notify=notes.append)


def writer(step):
    def write(files):
        files.put("engine/shard.bin", bytes([step]) * 1000)
        files.put("state.json", str(step).encode())

    return write


def save_and_wait(store, write, step, in_background):
    store.save(write, step, in_background=in_background)
    store.settle()


def folders(url):
    filesystem, root = fsspec.core.url_to_fs(url)
    return sorted(str(path).rpartition("/")[2] for path in filesystem.ls(root, detail=False))


def load(saved):
    step = saved.manifest.step
    assert saved.read("state.json").decode() == str(step)
    assert saved.read("engine/shard.bin") == bytes([step]) * 1000
    assert saved.read("engine/shard.bin", 10, 20) == bytes([step]) * 10
    return step


def step_found(store):
    return store.restore(load)


def damage(url, name, change):
    """Change a file of the newest checkpoint behind the store's back."""
    filesystem, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{folders(url)[-1]}/{name}"
    before = filesystem.cat_file(path)
    filesystem.rm(path)
    if (after := change(before)) is not None:
        filesystem.pipe_file(path, after)


def no_files(content):
    return json.dumps({**json.loads(content), "files": {}}).encode()


def test_nothing_is_found_where_nothing_was_saved(store, url):
    assert step_found(store) is None


def test_the_newest_is_found_and_the_oldest_dropped(store, url, notes):
    for step in (3, 20, 100):
        store.save(writer(step), step)
    assert step_found(store) == 100
    assert [name[:13] for name in folders(url)] == ["step-00000020", "step-00000100"]
    assert notes == ["resuming from the checkpoint of step 100"]


def test_one_without_its_manifest_is_ignored_and_swept_away(store, url):
    store.save(writer(3), 3)
    store.save(writer(6), 6)
    damage(url, "_DONE.json", lambda content: None)
    assert step_found(store) == 3
    assert len(folders(url)) == 1


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("engine/shard.bin", lambda c: c[:-1] + b"?", "engine/shard.bin has another checksum"),
        ("engine/shard.bin", lambda c: c[:-1], "engine/shard.bin has 999 bytes, not 1000"),
        ("state.json", lambda c: None, "state.json is missing"),
        *(
            ("_DONE.json", lambda c, text=text: text, "_DONE.json cannot be read")
            for text in (b"", b"{}", b"[]", b"5", b"null", b'{"step": 6', b"\xff")
        ),
        ("_DONE.json", lambda c: no_files(c), "names no files"),
    ],
)
def test_a_corrupt_one_is_named_and_the_one_before_used(store, url, notes, name, change, said):
    store.save(writer(3), 3)
    store.save(writer(6), 6)
    damage(url, name, change)
    assert step_found(store) == 3
    assert "step-00000006" in notes[0]
    assert said in notes[0]
    assert notes[1:] == ["resuming from the checkpoint of step 3"]


def test_where_all_are_corrupt_the_run_begins_again(store, url, notes):
    store.save(writer(6), 6)
    damage(url, "state.json", lambda content: b"7")
    assert step_found(store) is None
    assert len(notes) == 1


def test_discard_deletes_all(store, url):
    store.save(writer(6), 6)
    store.discard()
    store.discard()
    assert step_found(store) is None


@pytest.fixture
def full_disk():
    """Let real writes meet real errors."""
    with no_large_files():
        yield


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_told_and_the_last_checkpoint_stays_good(
    workers, tmp_path, full_disk, in_background
):
    store = CheckpointStore(str(tmp_path), workers)
    store.save(writer(3), 3)
    with pytest.raises(
        StageError, match=r"the checkpoint of step 6 could not be written to .*"
    ) as e:
        save_and_wait(store, lambda files: files.put("big", bytes(1 << 17)), 6, in_background)
    assert "make room" in str(e.value)
    assert not [*tmp_path.rglob("big*")]
    assert step_found(store) == 3


def test_storage_that_takes_nothing_is_told(workers, tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(str(tmp_path / "file" / "checkpoints"), workers)
    with pytest.raises(StageError, match="could not be written"):
        store.save(writer(3), 3)


def test_an_error_of_the_engine_is_not_taken_for_a_full_disk(store):
    def write(folder):
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        store.save(write, 3)
    assert step_found(store) is None


def test_a_part_is_kept_by_itself_and_goes_with_the_whole(store, url, notes):
    store.save(writer(1), 1)
    part = store.part("layer-00003")
    assert step_found(part) is None
    part.save(writer(7), 7)
    assert part.restore(load, announced=False) == 7
    assert notes == []
    assert step_found(store.part("layer-00003")) == 7
    assert step_found(store.part("layer-00004")) is None
    assert step_found(store) == 1
    store.discard()
    assert step_found(part) is None


@pytest.mark.parametrize("ending", ["settled", "abandoned"])
def test_what_is_written_in_the_background_counts_when_it_is_whole(store, url, ending):
    store.save(writer(3), 3)
    goes_on = threading.Event()

    def write(files):
        files.put("state.json", b"6")
        goes_on.wait(30)
        files.put("engine/shard.bin", bytes([6]) * 1000)

    store.save(write, 6, in_background=True)
    store.check()
    assert newest_step(url) == 3
    if ending == "settled":
        goes_on.set()
        store.settle()
        assert newest_step(url) == step_found(store) == 6
        return
    threading.Timer(0.1, goes_on.set).start()
    store.abandon()
    assert newest_step(url) == 3
    assert len(folders(url)) == 2  # half of one, which the next run sweeps away
    assert step_found(store) == 3
    assert len(folders(url)) == 1


def take_steps(store):
    for _ in range(1000):
        store.check()
        time.sleep(0.01)


def test_an_error_in_the_background_is_raised_once(store):
    def write(files):
        raise RuntimeError("the store said no")

    store.save(write, 3, in_background=True)
    with pytest.raises(RuntimeError, match="the store said no"):
        take_steps(store)
    store.check()
    store.settle()
    assert step_found(store) is None
