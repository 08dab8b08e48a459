"""Copies of artifacts: fetched once a machine, checked, kept while they are used, deleted after."""

import os
import subprocess
import sys
import uuid

import pytest

from pipeline.errors import StageError
from pipeline.storage import checksums, node_copies
from pipeline.storage.filesystems import open_storage
from pipeline.storage.node_copies import DamagedArtifactError, release, remove_unused
from pipeline.store.artifacts import Artifact, ArtifactStore
from tests.object_storage import sent_objects
from tests.processes import ranks_command, run

FILES = {
    "model/model.safetensors": os.urandom(300_000),
    "model/config.json": b'{"a": 1}',
    "empty": b"",
    "logs/rank-0.log": b"l" * 50_000,
    "tensorboard/events": b"t" * 50_000,
}
READ = {name: data for name, data in FILES.items() if name[:4] not in ("logs", "tens")}


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """The cache folder of a machine that has nothing yet."""
    monkeypatch.setenv("MGPP_CACHE", str(tmp_path / "machine"))
    yield tmp_path / "machine"
    release()


def commit(store, key="0123456789abcdef"):
    """Make an artifact on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGPP_CACHE", os.environ["MGPP_CACHE"] + "-other")
        attempt = store.begin("prune", key, {}, {})
        for name, content in FILES.items():
            path = attempt.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        made = attempt.commit({}, 0.0)
        release()
    return made


@pytest.fixture
def artifact():
    return commit(ArtifactStore(f"memory://{uuid.uuid4().hex}/storage"))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def change(artifact, name, how):
    """Change a file in storage; it is there still, and as long, unless `how` says else."""
    filesystem, root = open_storage(artifact.url)
    before = filesystem.cat_file(f"{root}/{name}")
    filesystem.rm(f"{root}/{name}")
    after = how(before)
    if after is not None:
        filesystem.pipe_file(f"{root}/{name}", after)


def flip(data):
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.distributed
def test_four_ranks_of_a_machine_fetch_each_byte_once_and_none_of_the_logs(
    bucket, tmp_path, machine
):
    made = commit(ArtifactStore(f"{bucket}/once"))
    with sent_objects() as sent:
        worker = "tests.pipeline.store.copies_worker"
        done = run(ranks_command(worker, made.url, str(tmp_path), num_processes=4), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = {(tmp_path / f"rank-{rank}").read_text() for rank in range(4)}
    assert contents(machine / path) == READ
    fetched = [(name, size) for name, size in sent if name != "_DONE.json"]
    assert sorted(fetched) == sorted((n.rpartition("/")[2], len(data)) for n, data in READ.items())


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_SH); print(); input()"


def test_a_copy_in_use_stays_until_its_user_ends_however_it_ends(artifact, machine):
    path = artifact.path
    release()
    command = [sys.executable, "-c", HOLD, str(path.parent / "use.lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as user:
        user.stdout.readline()
        remove_unused()
        assert contents(path) == READ
        user.kill()
    remove_unused()
    assert list((machine / "artifacts").iterdir()) == []
    _ = artifact.path
    remove_unused()  # this process uses it
    assert contents(path) == READ


def test_a_copy_outlives_its_stage_and_is_used_again(artifact, monkeypatch):
    path = artifact.path
    release()
    remove_unused(idle_seconds=3600)
    change(artifact, "model/config.json", lambda data: None)  # nothing is asked of storage
    assert artifact.path == path
    assert contents(path) == READ


def test_what_is_made_here_is_this_machine_s_copy(machine):
    store = ArtifactStore(f"memory://{uuid.uuid4().hex}/storage")
    attempt = store.begin("prune", "0123456789abcdef", {}, {})
    (attempt.folder / "weights").write_bytes(b"w" * 100)
    made = attempt.commit({}, 0.0)
    change(made, "weights", lambda data: None)
    assert made.path == attempt.folder
    release()
    remove_unused()
    assert not attempt.folder.exists()


def test_a_copy_that_went_wrong_here_is_fetched_again(artifact):
    path = artifact.path / "model" / "model.safetensors"
    path.write_bytes(flip(path.read_bytes()))
    (artifact.path / "model" / "config.json").unlink()
    assert contents(artifact.path) == READ


def test_a_fetch_that_was_killed_is_finished(artifact):
    part = artifact.path / "model" / "model.safetensors.part"
    part.write_bytes(b"half")
    (artifact.path / "model" / "model.safetensors").unlink()
    assert contents(artifact.path) == READ


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (flip, "has another checksum"),
        (lambda data: data[:-1], "has 299999 bytes, not 300000"),
        (lambda data: None, "is missing"),
    ],
)
@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_is_not_what_was_committed_is_refused(tmp_path, where, how, said):
    url = str(tmp_path / "runs") if where == "local" else f"memory://{uuid.uuid4().hex}/runs"
    made = commit(ArtifactStore(url))
    change(made, "model/model.safetensors", how)
    with pytest.raises(DamagedArtifactError) as raised:
        _ = made.path
    assert raised.value.url == made.url
    assert raised.value.problems == {"model/model.safetensors": said}
    text = str(raised.value)
    assert f"{made.url}: model/model.safetensors {said}; `mgpp store verify" in text
    assert f"verify {made.url.rsplit('/', 2)[0]} --discard`" in text


def test_a_record_for_people_may_be_gone(tmp_path):
    made = commit(ArtifactStore(str(tmp_path / "runs")))
    for name in ("logs/rank-0.log", "tensorboard/events"):
        change(made, name, lambda data: None)
    assert contents(made.path) == READ


def test_one_file_is_checked_where_it_is_read_alone(artifact):
    assert artifact.read_text("model/config.json") == '{"a": 1}'
    change(artifact, "model/config.json", flip)
    with pytest.raises(DamagedArtifactError, match=r"model/config\.json has another checksum"):
        artifact.read_text("model/config.json")
    change(artifact, "model/config.json", lambda data: None)
    with pytest.raises(DamagedArtifactError, match=r"model/config\.json is missing"):
        artifact.read_text("model/config.json")


def test_an_unchanged_local_artifact_is_read_once(tmp_path, monkeypatch):
    made = commit(ArtifactStore(str(tmp_path / "runs")))
    for path in made.path.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    _ = made.path
    monkeypatch.setattr(checksums, "_parts", None)
    assert contents(made.path) == FILES


def test_a_machine_without_room_says_so_after_unused_copies_are_gone(
    artifact, machine, monkeypatch
):
    other = commit(ArtifactStore(f"memory://{uuid.uuid4().hex}/storage"), key="f" * 16)
    _ = other.path
    release()

    class Usage:
        free = 299_999

    monkeypatch.setattr(node_copies.shutil, "disk_usage", lambda folder: Usage)
    said = r"machine has 0\.0 GB free, and prune-0123456789abcdef-.* takes 0\.0 GB.*MGPP_CACHE"
    with pytest.raises(StageError, match=said):
        _ = artifact.path
    kept = [path.name for path in (machine / "artifacts").iterdir()]
    assert len(kept) == 1
    assert kept[0].startswith("prune-0123456789abcdef")


def test_a_machine_whose_cache_cannot_be_written_fetches_nothing_and_reads_what_is_local(
    artifact, tmp_path, machine
):
    machine.write_text("a file in the place of the folder")
    with pytest.raises(StageError, match=r"cannot be written.*MGPP_CACHE"):
        _ = artifact.path
    made = commit(ArtifactStore(str(tmp_path / "runs")))
    assert contents(made.path) == FILES


def test_what_a_killed_command_left_goes_after_a_while(artifact, machine):
    place = artifact.path.parent
    release()
    other = commit(ArtifactStore(f"memory://{uuid.uuid4().hex}/storage"), key="f" * 16)
    os.utime(place / "use.lock", (1_700_000_000, 1_700_000_000))
    _ = other.path
    assert not place.exists()


def test_the_error_crosses_processes():
    import pickle

    error = DamagedArtifactError("s3://b/prune-0/a-1", {"a": "is missing", "b": "is missing"})
    again = pickle.loads(pickle.dumps(error))
    assert (again.url, again.problems, str(again)) == (error.url, error.problems, str(error))
    assert "a is missing (and 1 more files)" in str(error)


def test_an_artifact_is_plain_data(artifact):
    from dataclasses import asdict

    assert Artifact(**asdict(artifact)) == artifact
