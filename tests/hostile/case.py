"""An input that must be refused, and the one line that says why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input.

    Attributes:
        name: of the case, in the test's report.
        line: what is said: the whole of it. Paths in it are relative to the folder of the files.
        files: written before, by name: text, bytes, or rows of a Parquet file.
        overrides: `key=value` changes to the kind's configuration.
        environment: variables set meanwhile.
    """

    name: str
    line: str
    files: Mapping[str, str | bytes | list] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write the files to the working directory, over what every case of the kind has."""
        for name, content in {**files, **self.files}.items():
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, list):
                pq.write_table(pa.Table.from_pylist(content), path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
