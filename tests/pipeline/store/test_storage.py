"""Storage: what can be used as such, and files made by one of many."""

import os
import threading

import pytest

from pipeline.errors import ConfigError
from pipeline.store.storage import (
    absolute_url,
    create_json,
    open_storage,
    put_json,
    read_json,
    storage_problems,
)


def test_json_is_put_and_read(url):
    filesystem, path = open_storage(f"{url}/state.json")
    assert read_json(filesystem, path) is None
    assert create_json(filesystem, path, {"step": 1})
    put_json(filesystem, path, {"step": 2, "é": [None]})
    assert read_json(filesystem, path) == {"step": 2, "é": [None]}
    with filesystem.open(path, "wb") as file:
        file.write(b'{"step": 3')
    assert read_json(filesystem, path) is None


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


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    assert storage_problems(str(tmp_path / "a" / "b")) == []
    (tmp_path / "file").write_text("")
    (problem,) = map(str, storage_problems(str(tmp_path / "file" / "runs")))
    assert problem.startswith("storage: ")
    assert problem.endswith("file is not a folder")
    # Root may write where users may not.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (problem,) = map(str, storage_problems(str(tmp_path / "runs")))
    assert "read-only" in problem


def test_a_bucket_that_is_not_there(bucket):
    assert storage_problems(f"{bucket}/runs") == []
    assert list(map(str, storage_problems("s3://another/runs"))) == [
        "storage: s3://another/runs: there is no bucket 'another'"
    ]


def test_a_protocol_without_its_package(monkeypatch):
    def missing(url, **_):
        raise ImportError("no module")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    assert list(map(str, storage_problems("gs://bucket/runs"))) == [
        "storage: gs:// needs a package that is not installed: pip install 'mgpp[gcs]'"
    ]


def test_an_unknown_protocol():
    (problem,) = map(str, storage_problems("nowhere://bucket"))
    assert problem.startswith("storage: nowhere://bucket cannot be reached: ")
