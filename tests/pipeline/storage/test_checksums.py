"""Checksums by block, beside hashlib over the cut file."""

import hashlib
import io
from pathlib import Path

import pytest

from pipeline.storage import checksums
from pipeline.storage.checksums import BlockHasher, HashingStream, describe, problem

DATA = bytes(range(256)) * 10


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 1000)


def cut(data: bytes) -> list[str]:
    """The checksums, from the file cut by hand."""
    return [hashlib.sha256(data[i : i + 1000]).hexdigest() for i in range(0, len(data), 1000)]


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2560])
@pytest.mark.parametrize("part", [1, 7, 1000, 5000])
def test_blocks_are_those_of_the_file_cut_by_hand(tmp_path: Path, size: int, part: int) -> None:
    data, sink, hasher = DATA[:size], io.BytesIO(), BlockHasher()
    stream = HashingStream(sink)
    for i in range(0, size, part):
        hasher.update(data[i : i + part])
        assert stream.write(memoryview(data)[i : i + part]) == len(data[i : i + part])
    (tmp_path / "f").write_bytes(data)
    want = {"bytes": size, "blocks": cut(data)}
    assert hasher.entry() == stream.entry() == describe(tmp_path / "f") == want
    assert sink.getvalue() == data
    assert problem(io.BytesIO(data), want) is None


def test_what_differs_is_said() -> None:
    entry = {"bytes": len(DATA), "blocks": cut(DATA)}
    old = {"bytes": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
    changed = DATA[:1500] + b"?" + DATA[1501:]
    for of in (entry, old):
        assert problem(io.BytesIO(DATA), of) is None
        assert problem(io.BytesIO(changed), of) == "another checksum"
        assert problem(io.BytesIO(DATA[:-1]), of) == f"{len(DATA) - 1} bytes, not {len(DATA)}"
