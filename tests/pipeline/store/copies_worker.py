"""A rank that needs an artifact on remote storage."""

import os
from pathlib import Path

from pipeline.store.artifacts import open_artifact


def main(url: str, output: str) -> None:
    """Open the artifact at a URL, and note where it is on this machine."""
    (Path(output) / f"rank-{os.environ['RANK']}").write_text(str(open_artifact(url).path))
