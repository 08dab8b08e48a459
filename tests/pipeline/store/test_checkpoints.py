"""Checkpoints are complete or ignored, a corrupt one is named and skipped, old ones go."""

import json
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist

from pipeline.errors import StageError
from pipeline.store.checkpoints import CheckpointStore
from pipeline.worker_group import WorkerGroup


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
    def write(folder):
        (folder / "engine").mkdir()
        (folder / "engine" / "shard.bin").write_bytes(bytes([step]) * 1000)
        (folder / "state.json").write_text(str(step))

    return write


def folders(url):
    filesystem, root = fsspec.core.url_to_fs(url)
    return sorted(str(path).rpartition("/")[2] for path in filesystem.ls(root, detail=False))


def step_found(store):
    with store.latest() as found:
        if found is None:
            return None
        step = found.manifest.step
        assert found.file("state.json").read_text() == str(step)
        assert found.file("engine/shard.bin").read_bytes() == bytes([step]) * 1000
        return step


def damage(url, name, change):
    """Change a file of the newest checkpoint behind the store's back."""
    filesystem, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{folders(url)[-1]}/{name}"
    before = filesystem.cat_file(path)
    filesystem.rm(path)
    if (after := change(before)) is not None:
        filesystem.pipe_file(path, after)


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
        ("_DONE.json", lambda c: c[:-5], "_DONE.json cannot be read"),
        ("_DONE.json", lambda c: b"{}", "_DONE.json cannot be read"),
        (
            "_DONE.json",
            lambda c: json.dumps({**json.loads(c), "files": {}}).encode(),
            "_DONE.json names no files",
        ),
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


@pytest.mark.parametrize("by", ["python", "torch"])
def test_a_full_disk_is_told_and_the_last_checkpoint_stays_good(store, by):
    def write(folder: Path):
        (folder / "state.json").symlink_to("/dev/full")  # real ENOSPC from a real write
        if by == "torch":
            torch.save(torch.zeros(100_000), folder / "state.json")
        else:
            (folder / "state.json").write_text("x" * 100_000)

    store.save(writer(3), 3)
    with pytest.raises(
        StageError, match=r"the checkpoint of step 6 could not be written to .*"
    ) as e:
        store.save(write, 6)
    assert "make room" in str(e.value)
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
    with part.latest(announced=False) as found:
        assert found.manifest.step == 7
    assert notes == []
    assert step_found(store.part("layer-00003")) == 7
    assert step_found(store.part("layer-00004")) is None
    assert step_found(store) == 1
    store.discard()
    assert step_found(part) is None
