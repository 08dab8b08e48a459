"""Files that the workers of a stage write straight to storage, each worker whole files of its own."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.storage.checksums import HashingStream
from pipeline.storage.filesystems import is_local, open_storage


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

        Args:
            name: its relative path; no two workers may write the same.
        """
        path = f"{self._root.rstrip('/')}/{name}"
        if is_local(self._fs):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = self._fs.open(path, "wb")
        stream = HashingStream(file)
        try:
            yield stream
        except BaseException:
            # Closing would make a file of what was uploaded. What fails now is not what failed first.
            with suppress(Exception):
                (file.close if is_local(self._fs) else file.discard)()
            raise
        file.close()
        self.written[name] = stream.entry()
