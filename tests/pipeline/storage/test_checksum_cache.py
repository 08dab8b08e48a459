"""Remembered checksums: what did not change is not read, whatever happens to the memory."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

from pipeline.errors import StageError
from pipeline.storage import checksum_cache, checksums
from pipeline.storage.checksum_cache import content_checksum, description, mismatch
from pipeline.store.locations import content_sha256
from tests.processes import ROOT

OLD = 1_700_000_000  # seconds: long enough ago


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """The file of what is remembered: none yet."""
    monkeypatch.setenv("MGPP_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "checksums-1.sqlite"
    forget()


def forget():
    """Be as a new process is."""
    checksum_cache._once_a_process.cache_clear()
    checksum_cache._memory.cache_clear()


@pytest.fixture
def reads(monkeypatch):
    """The files that are read."""
    found = []

    def counting(function):
        def called(source, *args):
            found.append(source.name)
            return function(source, *args)

        return called

    monkeypatch.setattr(hashlib, "file_digest", counting(hashlib.file_digest))
    monkeypatch.setattr(checksum_cache, "describe", counting(checksums.describe))
    return found


def write(path, data, when=OLD):
    path.write_bytes(data)
    os.utime(path, (when, when))
    return path


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once_by_all_processes_and_again_when_it_changed(tmp_path, reads):
    path = write(tmp_path / "weights", b"one")
    for _ in range(3):
        forget()
        assert content_checksum(path) == sha256(b"one")
    assert len(reads) == 1
    write(path, b"two", when=OLD + 1)
    forget()
    assert content_checksum(path) == sha256(b"two")
    assert len(reads) == 2


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path):
    path = write(tmp_path / "weights", b"one")
    assert content_checksum(path) == sha256(b"one")
    write(path, b"two")  # in place, and its time put back
    forget()
    assert content_checksum(path) == sha256(b"two")
    other = write(tmp_path / "other", b"six")
    other.replace(path)
    forget()
    assert content_checksum(path) == sha256(b"six")


def test_a_file_modified_just_now_is_not_remembered(tmp_path, reads):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    for _ in range(2):
        forget()
        content_checksum(path)
    assert len(reads) == 2
    # But read once a process: one command sees one content.
    content_checksum(path)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "weights", b"one")

    def slow(file, name, real=hashlib.file_digest):
        path.write_bytes(b"another")
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    with pytest.raises(StageError, match=r"weights changed while it was read"):
        content_checksum(path)


def test_entries_of_manifests_are_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 4)
    path = write(tmp_path / "model", b"0123456789")
    entry = description(path)
    assert entry == {"bytes": 10, "blocks": [sha256(b"0123"), sha256(b"4567"), sha256(b"89")]}
    forget()
    assert mismatch(path, entry) is None
    assert len(reads) == 1
    whole = {"bytes": 10, "sha256": sha256(b"0123456789")}  # of an earlier version
    assert mismatch(path, whole) is None
    assert mismatch(path, whole) is None
    assert len(reads) == 2
    assert mismatch(path, {**entry, "bytes": 11}) == "has 10 bytes, not 11"
    assert mismatch(tmp_path / "none", entry) == "is missing"
    write(path, b"0123456780", when=OLD + 1)
    assert mismatch(path, entry) == "has another checksum"
    assert mismatch(path, whole) == "has another checksum"


def flipped_value(memory):
    """Change a checksum behind SQLite's back."""
    with sqlite3.connect(memory) as connection:
        connection.execute("UPDATE files SET value = replace(value, substr(value, 1, 1), 'x')")
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        flipped_value,
        lambda memory: memory.write_bytes(b""),
        lambda memory: memory.write_bytes(b"no database at all" * 100),
        lambda memory: memory.write_bytes(memory.read_bytes()[:5000]),
        lambda memory: memory.write_bytes(
            memory.read_bytes()[:4096] + b"\xff" * (memory.stat().st_size - 4096)
        ),
        lambda memory: sqlite3.connect(memory).execute("DROP TABLE files"),
    ],
    ids=["value", "empty", "other", "cut", "pages", "table"],
)
def test_a_damaged_memory_costs_a_reading_and_no_more(tmp_path, memory, reads, damage):
    path = write(tmp_path / "weights", b"one")
    content_checksum(path)
    forget()
    damage(memory)
    assert content_checksum(path) == sha256(b"one")
    assert len(reads) == 2
    forget()
    assert content_checksum(path) == sha256(b"one")
    assert len(reads) == 2  # it works again


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_where_nothing_can_be_remembered_files_are_read(tmp_path, monkeypatch, kind):
    if kind == "file":  # in the place of the folder
        (tmp_path / "cache").write_text("")
    else:  # in the place of the file
        (tmp_path / "cache" / "checksums-1.sqlite").mkdir(parents=True)
    path = write(tmp_path / "weights", b"one")
    assert content_checksum(path) == sha256(b"one")


WRITERS = """
import sys
from pathlib import Path
from pipeline.storage.checksum_cache import content_checksum
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, content_checksum(path))
"""


@pytest.mark.slow
def test_processes_that_write_at_once_all_have_the_right_answer(tmp_path, memory, reads):
    folder = tmp_path / "model"
    folder.mkdir()
    for i in range(60):
        write(folder / f"{i}", bytes([i]) * 1000)
    memory.parent.mkdir()
    memory.write_bytes(b"damaged, too")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITERS, str(folder)]
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    expected = {f"{p.name} {sha256(p.read_bytes())}" for p in folder.iterdir()}
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert set(out.splitlines()) == expected
    content_sha256(folder)
    assert len(reads) < 60  # some were remembered, though the first memory was thrown away


def test_the_memory_may_be_deleted(tmp_path, memory):
    path = write(tmp_path / "weights", b"one")
    content_checksum(path)
    forget()
    shutil.rmtree(memory.parent)
    assert content_checksum(path) == sha256(b"one")
