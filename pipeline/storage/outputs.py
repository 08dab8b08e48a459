"""Files that the workers of a stage write straight to storage, each worker whole files of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.storage.checksums import HashingStream
from pipeline.storage.filesystems import open_storage
from pipeline.storage.writing import written


class OutputFiles:
    """What this worker writes beside the stage's own folder, with no copy on its disk.

    Args:
        url: of the attempt's folder; a local one must be the same folder for all workers.

    Attributes:
        written: of the files that are whole, by relative path: size and checksums, for the manifest.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = open_storage(url)
        self.url = url
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def open(self, name: str) -> Iterator[HashingStream]:
        """Give a stream to a new file; it is among `written` once the block ends without an error.

        Any thread may call.

        Args:
            name: its relative path; no two workers may write the same.
        """
        with written(self._fs, f"{self._root.rstrip('/')}/{name}") as stream:
            yield stream
        self.written[name] = stream.entry()
