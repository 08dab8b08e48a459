"""Files of which every byte is checked as it is read: whole, or the blocks that a slice touches."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import fsspec

from pipeline.errors import DamagedFileError
from pipeline.storage.checksums import BLOCK_BYTES, BlockHasher, problem


class VerifiedFiles:
    """The files of one manifest, read from storage as they are needed and never kept on a disk.

    What was read last is held in memory, so that reading on costs no second request.

    Args:
        filesystem: of the storage.
        folder: where they lie.
        entries: by name, as `checksums.HashingStream` made them; older ones have one sha256 of the file.
        held: blocks of 64 MiB in memory at most.
    """

    def __init__(
        self,
        filesystem: fsspec.AbstractFileSystem,
        folder: str,
        entries: Mapping[str, Mapping[str, Any]],
        held: int = 9,
    ) -> None:
        self.entries = entries
        self._fs, self._folder = filesystem, folder
        self._held = held
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._checked: set[str] = set()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of a file from `begin` to `end`, all of them unless given.

        Raises:
            DamagedFileError: if a block that they lie in is not what was written.
        """
        entry = self.entries[name]
        end = entry["bytes"] if end is None else end
        if begin >= end:
            return b""
        if "blocks" not in entry:
            self._check_whole(name)
            return self._fetch(name, begin, end)
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        parts = []
        for index, block in zip(
            range(first, last), self._blocks_of(name, first, last), strict=True
        ):
            at = index * BLOCK_BYTES
            parts.append(memoryview(block)[max(begin - at, 0) : end - at])
        return b"".join(parts)

    def _blocks_of(self, name: str, first: int, last: int) -> list[bytes]:
        """Return blocks `first` to `last` (exclusive) of a file; one request for all that are missing."""
        missing = [i for i in range(first, last) if (name, i) not in self._blocks]
        fetched: dict[int, bytes] = {}
        if missing:
            begin = missing[0] * BLOCK_BYTES
            end = min((missing[-1] + 1) * BLOCK_BYTES, self.entries[name]["bytes"])
            data = self._fetch(name, begin, end)
            for at in range(0, end - begin, BLOCK_BYTES):
                index, block = (begin + at) // BLOCK_BYTES, data[at : at + BLOCK_BYTES]
                self._check_block(name, index, block)
                fetched[index] = block
        found = [fetched[i] if i in fetched else self._blocks[name, i] for i in range(first, last)]
        for index, block in zip(range(first, last), found, strict=True):
            self._blocks[name, index] = block
            self._blocks.move_to_end((name, index))
        while len(self._blocks) > self._held:
            self._blocks.popitem(last=False)
        return found

    def _check_block(self, name: str, index: int, block: bytes) -> None:
        hasher = BlockHasher()
        hasher.update(block)
        if hasher.entry()["blocks"] != self.entries[name]["blocks"][index : index + 1]:
            raise DamagedFileError(f"{name} has another checksum")

    def _check_whole(self, name: str) -> None:
        """Check a file of which there is one checksum; reads it once more than what is read of it."""
        if name in self._checked:
            return
        try:
            with self._fs.open(f"{self._folder}/{name}", "rb") as file:
                why = problem(file, self.entries[name])
        except FileNotFoundError:
            raise DamagedFileError(f"{name} is missing") from None
        if why is not None:
            raise DamagedFileError(f"{name} has {why}")
        self._checked.add(name)

    def _fetch(self, name: str, begin: int, end: int) -> bytes:
        try:
            data = self._fs.cat_file(f"{self._folder}/{name}", start=begin, end=end)
        except FileNotFoundError:
            raise DamagedFileError(f"{name} is missing") from None
        if len(data) != end - begin:
            size = begin + len(data)
            raise DamagedFileError(f"{name} has {size} bytes, not {self.entries[name]['bytes']}")
        return bytes(data)
