"""Where finished parts of unfinished work lie: on this machine, for the next attempt at its key.

<storage>/<stage>-<key>/parts/                        where storage is a folder
<temporary>/mgpp-parts/<storage>/<stage>-<key>/       where it is remote; <storage> is a digest of its URL
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.store.artifacts import ArtifactStore
from pipeline.store.leases import LeaseFolder

PARTS = "parts"


def parts_folder(store: ArtifactStore, stage: str, key: str) -> Path:
    """Return the folder of a key's parts; it may not be there."""
    if store.is_local:
        return Path(store.folder_of(stage, key)) / PARTS
    return _of_remote(store) / f"{stage}-{key}"


def discard_parts(folder: Path) -> None:
    """Delete parts that are no longer needed; there may be none."""
    if folder.exists():
        shutil.rmtree(folder)


def abandoned_parts(
    store: ArtifactStore, *, older_than_days: float
) -> Iterator[tuple[Path, int, str]]:
    """Yield what lies on this machine of a remote store's keys and is of no use, its bytes, and why.

    Those are parts of finished work, and parts untouched for a time, of work that nobody does.

    Args:
        store: whose.
        older_than_days: that time.
    """
    root = _of_remote(store)
    for folder in sorted(root.iterdir()) if not store.is_local and root.is_dir() else ():
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
        newest = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
        age = (time.time() - newest) / 86400
        stage, _, key = folder.name.rpartition("-")
        lease = LeaseFolder(store.folder_of(stage, key)).newest()
        if store.find(stage, key) is not None:
            why = "left over from finished work"
        elif age > older_than_days and not (lease is not None and lease.is_held):
            why = f"unfinished and untouched for {age:.0f} days"
        else:
            continue
        yield folder, sum(file.st_size for file in files), why


def _of_remote(store: ArtifactStore) -> Path:
    digest = hashlib.sha256(store.url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / "mgpp-parts" / digest
