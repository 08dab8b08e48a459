"""Checksums of files by blocks of 64 MiB: taken while a file is written, checked where it is read.

sha256, because processors have instructions for it, no two files share one by chance or by design, and
`sha256sum` checks it by hand. A file's entry in a manifest is `{"bytes": ..., "blocks": [hex, ...]}`; a
reader of a slice checks the blocks that it touches. Older entries have one `sha256` of the whole file.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

BLOCK_BYTES = 64 << 20
_READ_BYTES = 1 << 20


class Stream(Protocol):
    """What bytes are written to: an open file, a file of fsspec."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take all of the bytes."""


class BlockHasher:
    """Checksums of a stream's blocks, taken as it passes."""

    def __init__(self) -> None:
        self._bytes = 0
        self._blocks: list[str] = []
        self._block = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(data).cast("B")
        while view:
            room = BLOCK_BYTES - self._bytes % BLOCK_BYTES
            part, view = view[:room], view[room:]
            self._block.update(part)
            self._bytes += len(part)
            if self._bytes % BLOCK_BYTES == 0:
                self._blocks.append(self._block.hexdigest())
                self._block = hashlib.sha256()

    def entry(self) -> dict[str, Any]:
        """Return the file's entry in a manifest: its size and the checksum of every block."""
        rest = [self._block.hexdigest()] if self._bytes % BLOCK_BYTES else []
        return {"bytes": self._bytes, "blocks": self._blocks + rest}


class HashingStream:
    """A stream that takes checksums of what is written through it.

    Args:
        stream: where the bytes go. The caller opens and closes it.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._hasher = BlockHasher()

    def write(self, data: bytes | memoryview) -> int:
        """Write all bytes."""
        self._hasher.update(data)
        self._stream.write(data)
        return memoryview(data).nbytes

    def entry(self) -> dict[str, Any]:
        """Return the entry of what was written so far."""
        return self._hasher.entry()


def describe(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest; reads it once."""
    hasher = BlockHasher()
    with path.open("rb") as file:
        for data in _parts(file):
            hasher.update(data)
    return hasher.entry()


def problem(file: BinaryIO, entry: Mapping[str, Any]) -> str | None:
    """Return how a whole file differs from its entry, or None; reads it once, from where it stands."""
    hasher, whole = BlockHasher(), hashlib.sha256()
    for data in _parts(file):
        hasher.update(data)
        if "blocks" not in entry:
            whole.update(data)
    found = hasher.entry()
    if found["bytes"] != entry["bytes"]:
        return f"{found['bytes']} bytes, not {entry['bytes']}"
    if "blocks" in entry:
        same = found["blocks"] == entry["blocks"]
    else:
        same = whole.hexdigest() == entry["sha256"]
    return None if same else "another checksum"


def _parts(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(_READ_BYTES):
        yield data
