"""Storage: what can be used as such, and files made by one of many."""

import sys
import threading

import fsspec
import pytest

from pipeline.errors import ConfigError
from pipeline.storage.filesystems import (
    absolute_url,
    create_json,
    open_storage,
    put_json,
    read_json,
    storage_problems,
)
from pipeline.store.maintenance import readable_store
from tests.object_storage import s3_server_away
from tests.processes import run


def test_json_is_put_and_read(url):
    filesystem, path = open_storage(f"{url}/state.json")
    assert read_json(filesystem, path) is None
    assert create_json(filesystem, path, {"step": 1})
    put_json(filesystem, path, {"step": 2, "é": [None]})
    assert read_json(filesystem, path) == {"step": 2, "é": [None]}
    assert not create_json(filesystem, path, {"step": 3})
    assert read_json(filesystem, path) == {"step": 2, "é": [None]}


def test_of_many_that_create_a_file_one_does(url):
    won = []

    def create(number):
        filesystem, path = open_storage(f"{url}/lease")
        barrier.wait()
        if create_json(filesystem, path, number):
            won.append(number)

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    filesystem, path = open_storage(f"{url}/lease")
    assert won == [read_json(filesystem, path)]


def test_what_others_write_is_seen(url):
    filesystem, path = open_storage(url)
    other = type(filesystem)(skip_instance_cache=True, use_listings_cache=False)
    put_first, put_later = f"{path}/one", f"{path}/two"
    create_json(filesystem, put_first, 1)
    assert len(filesystem.ls(path, detail=False)) == 1
    create_json(other, put_later, 2)
    assert len(filesystem.ls(path, detail=False)) == 2
    assert filesystem.exists(put_later)
    other.rm(put_later)
    assert not filesystem.exists(put_later)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a" * 5000, "File name too long"),
        ("é" * 200, "File name too long"),
        ("/a" * 1950, "File name too long"),  # a path that leaves no room for what lies below
        ("a\0b", "embedded null byte"),
        ("~no-such-user-here/runs", "Could not determine home directory."),
    ],
)
def test_paths_that_no_file_system_takes(tmp_path, name, why):
    storage = name if name.startswith("~") else f"{tmp_path}/{name}"
    (problem,) = storage_problems(storage)
    assert (problem.key, problem.got) == ("storage", storage)
    assert problem.why == f"no file system takes this path: {why}"
    with pytest.raises(ConfigError, match=f"^storage: no file system takes this path: {why}"):
        absolute_url(storage)


@pytest.mark.parametrize("name", ["", "a/b", "here/a/b"])
def test_a_folder_is_tried_and_nothing_is_left_in_it(tmp_path, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes").write_text("mine")
    assert storage_problems(str(tmp_path / name)) == []
    assert storage_problems(f"file://{tmp_path}/{name}") == []
    assert absolute_url(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "notes"]


@pytest.mark.parametrize(
    ("storage", "why"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("://", "no such kind of storage"),
        ("://x", "no such kind of storage"),
        ("http://", "http:// can only be read"),
        ("https://host/runs", "https:// can only be read"),
        ("memory://", "memory:// is gone with the process that writes it"),
        ("memory://runs", "memory:// is gone with the process that writes it"),
        ("simplecache::s3://bucket/runs", "no such kind of storage"),
        ("nowhere://bucket", "no such kind of storage"),
        ("S3://bucket/runs", "no such kind of storage"),
        ("s3://", "names no bucket or folder"),
        ("file:///", "names no bucket or folder"),
        ("file://runs", "a folder's URL has three slashes: file:///FOLDER"),
        ("s3:/bucket/runs", "a URL has two slashes after its colon"),
    ],
)
def test_what_names_no_place_is_refused(storage, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (problem,) = storage_problems(storage)
    assert (problem.key, problem.got) == ("storage", storage)
    assert problem.why.startswith(why)
    assert problem.allowed[:2] == ("a folder", "s3://BUCKET/PATH")
    with pytest.raises(ConfigError, match=r"^storage: "):
        absolute_url(storage)
    assert list(tmp_path.iterdir()) == []


def test_what_takes_no_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/runs", "link/runs"):
        (problem,) = map(str, storage_problems(str(tmp_path / name)))
        assert problem.startswith(f"storage: {tmp_path}/{name} cannot be made: ")
        assert problem.endswith(" is not a folder")
    (problem,) = map(str, storage_problems("/proc/runs"))
    assert problem == "storage: /proc/runs cannot be written: /proc: No such file or directory"


TRY = "from pipeline.storage.filesystems import storage_problems as p; {}; print(*p('{}'))"


def tried_inside(script, folder):
    """What a process says of storage in a folder, on a machine of its own as far as mounts go."""
    command = f'{script} && exec {sys.executable} -c "{TRY.format("import os", folder)}"'
    done = run(["unshare", "--map-root-user", "--mount", "sh", "-c", command], timeout=60)
    if "unshare" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_full_and_read_only_storage_are_named(tmp_path):
    mount = f"mount -t tmpfs -o size=4k none {tmp_path}"
    storage = f"{tmp_path}/a/runs"
    full = f"{mount} && mkdir {tmp_path}/a && head -c 4096 /dev/zero > {tmp_path}/file"
    assert tried_inside(full, storage) == (
        f"storage: {storage} cannot be written: {tmp_path}/a: it is full (No space left on device)"
    )
    assert tried_inside(f"{mount} && mount -o remount,ro {tmp_path}", storage) == (
        f"storage: {storage} cannot be written: {tmp_path}: it is read-only (Read-only file system)"
    )


def test_a_folder_without_the_right_to_write_is_named(tmp_path):
    tmp_path.chmod(0o555)
    as_a_user = TRY.format("import os; os.getuid() or os.setuid(65534)", tmp_path / "runs")
    done = run([sys.executable, "-c", as_a_user], timeout=60)
    problem = done.stdout.strip()
    assert problem.startswith(f"storage: {tmp_path}/runs cannot be written: "), done.stderr
    assert problem.endswith("no right to (Permission denied)")


def test_an_object_store_is_tried_and_nothing_is_left_in_it(bucket):
    assert storage_problems(f"{bucket}/some/runs") == []
    filesystem, root = open_storage(f"{bucket}/some")
    assert filesystem.find(root) == []
    assert list(map(str, storage_problems("s3://another/runs"))) == [
        "storage: s3://another/runs: there is no bucket 'another'"
    ]


def test_a_server_that_does_not_answer_is_told_from_a_bucket_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with s3_server_away():
        for found in (*storage_problems(f"{bucket}/runs"), *_unreadable(f"{bucket}/runs")):
            assert "Could not connect to the endpoint URL" in str(found)
            assert "no bucket" not in str(found)
    assert readable_store(f"{bucket}/runs").url == f"{bucket}/runs"


def _unreadable(storage):
    with pytest.raises(ConfigError) as caught:
        readable_store(storage)
    return caught.value.problems


@pytest.mark.parametrize(
    ("operation", "error", "why"),
    [
        ("pipe_file", PermissionError("Access Denied"), "no right to (Access Denied)"),
        (
            "rm",
            PermissionError("Access Denied"),
            "files cannot be deleted: no right to (Access Denied)",
        ),
        ("pipe_file", NotImplementedError(), "it takes no files"),
    ],
)
def test_what_an_object_store_refuses_is_named(bucket, monkeypatch, operation, error, why):
    filesystem, _ = open_storage(bucket)

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(filesystem, operation, refuse)
    (problem,) = map(str, storage_problems(f"{bucket}/runs"))
    assert problem == f"storage: {bucket}/runs cannot be written: {why}"


def test_storage_that_overwrites_what_is_there_holds_no_lease(bucket, monkeypatch):
    filesystem, _ = open_storage(bucket)
    real = filesystem.pipe_file
    monkeypatch.setattr(filesystem, "pipe_file", lambda path, data, mode=None: real(path, data))
    (problem,) = map(str, storage_problems(f"{bucket}/runs"))
    assert problem.endswith("so leases would not hold")


def test_a_protocol_without_its_package(monkeypatch):
    def missing(url, **_):
        raise ImportError("no module")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    assert list(map(str, storage_problems("gs://bucket/runs"))) == [
        "storage: gs:// needs a package that is not installed: pip install 'mgpp[gcs]'"
    ]
