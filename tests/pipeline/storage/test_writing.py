"""Files are whole or not there at all, and only the blocks that are read are fetched and checked."""

import os

import fsspec
import pytest

from pipeline.errors import DamagedFileError
from pipeline.storage import checksums, verified
from pipeline.storage.checksums import describe
from pipeline.storage.filesystems import open_storage
from pipeline.storage.verified import VerifiedFiles
from pipeline.storage.writing import run_at_once, written

LARGE = 40 << 20  # several parts of an upload


@pytest.mark.parametrize("size", [0, 1000, LARGE])
def test_a_file_is_what_was_written_with_its_checksums(url, tmp_path, size):
    filesystem, root = open_storage(url)
    data = os.urandom(size)
    with written(filesystem, f"{root}/folder/file") as stream:
        stream.write(data[: size // 3])
        stream.write(data[size // 3 :])
    assert filesystem.cat_file(f"{root}/folder/file") == data
    (tmp_path / "same").write_bytes(data)
    assert stream.entry() == describe(tmp_path / "same")
    assert [str(p).rpartition("/")[2] for p in filesystem.find(f"{root}/folder")] == ["file"]


@pytest.mark.parametrize("size", [1000, LARGE])
def test_where_writing_fails_there_is_no_file_and_no_unfinished_upload(url, size):
    filesystem, root = open_storage(url)

    def write():
        with written(filesystem, f"{root}/folder/file") as stream:
            stream.write(bytes(size))
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write()
    assert filesystem.find(f"{root}/folder") == []
    if url.startswith("s3://"):
        assert filesystem.list_multipart_uploads(root.partition("/")[0]) == []


def test_writing_stops_where_the_check_raises(tmp_path):
    filesystem, calls = fsspec.filesystem("file"), []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("enough")

    def write():
        with written(filesystem, str(tmp_path / "file"), check) as stream:
            stream.write(bytes(LARGE))

    with pytest.raises(RuntimeError, match="enough"):
        write()
    assert len(calls) == 3
    assert not [*tmp_path.iterdir()]


def test_jobs_end_before_an_error_of_one_is_raised():
    done = []

    def fail():
        raise RuntimeError("one of them")

    jobs = [fail if i == 3 else lambda i=i: done.append(i) for i in range(100)]
    with pytest.raises(RuntimeError, match="one of them"):
        run_at_once(jobs, 2)
    assert {0, 1, 2} <= set(done)
    assert len(done) < 99


@pytest.fixture
def file(url, monkeypatch):
    """A file of ten blocks of 1000 bytes and a half one: its reader, content, and what is fetched."""
    for module in (checksums, verified):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    filesystem, root = open_storage(url)
    content = os.urandom(10_500)
    with written(filesystem, f"{root}/file") as stream:
        stream.write(content)
    files = VerifiedFiles(filesystem, root, {"file": stream.entry()}, held=4)
    fetched, fetch = [], files._fetch
    monkeypatch.setattr(files, "_fetch", lambda *where: fetched.append(where[1:]) or fetch(*where))
    return files, content, fetched, f"{root}/file"


def test_a_slice_fetches_the_blocks_that_it_touches_once(file):
    files, content, fetched, _ = file
    for begin, end in ((2500, 4100), (3000, 3001), (3900, 5000), (10_400, 10_500), (7, 7)):
        assert files.read("file", begin, end) == content[begin:end]
    assert fetched == [(2000, 5000), (10_000, 10_500)]
    assert files.read("file") == content  # more than is held
    assert len(files._blocks) == 4


def test_damage_is_found_where_it_is_read(file):
    files, content, _, path = file
    filesystem = files._fs
    filesystem.pipe_file(path, content[:4500] + bytes([content[4500] ^ 1]) + content[4501:])
    assert files.read("file", 0, 4000) == content[:4000]
    with pytest.raises(DamagedFileError, match="file has another checksum"):
        files.read("file", 4999, 5001)
    filesystem.pipe_file(path, content[:10_100])
    with pytest.raises(DamagedFileError, match="file has 10100 bytes, not 10500"):
        files.read("file", 10_000)
    filesystem.rm(path)
    with pytest.raises(DamagedFileError, match="file is missing"):
        files.read("file", 6000, 6001)
