"""The manifest that makes a checkpoint complete."""

from dataclasses import dataclass
from typing import Any

import fsspec

from pipeline.storage.filesystems import open_storage
from pipeline.storage.records import DamagedRecordError, read_record

DONE_FILE = "_DONE.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a complete checkpoint.

    Attributes:
        step: optimizer steps done.
        world_size: workers that wrote it.
        files: by relative path: `bytes`, `blocks` (in older ones `sha256`) and the `rank` that wrote it.
    """

    step: int
    world_size: int
    files: dict[str, dict[str, Any]]


def read_checkpoint(filesystem: fsspec.AbstractFileSystem, path: str) -> Manifest | None:
    """Return the manifest of a complete checkpoint; None where there is none.

    Raises:
        DamagedRecordError: if it is not what was written, or names no files.
    """
    manifest = read_record(filesystem, path, Manifest)
    if manifest is None:
        return None
    if not manifest.files:
        raise DamagedRecordError(path, "names no files")
    for name, entry in manifest.files.items():
        is_good = (
            isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("blocks", []), list)
            and isinstance(entry.get("sha256", ""), str)
            and not entry.keys().isdisjoint({"blocks", "sha256"})
        )
        if not is_good:
            raise DamagedRecordError(path, f"files.{name} has no size or no checksum")
    return manifest


def good_manifest(filesystem: fsspec.AbstractFileSystem, folder: str) -> Manifest | None:
    """Return a checkpoint's manifest; None where it is none, such as one without files."""
    try:
        return read_checkpoint(filesystem, f"{folder}/{DONE_FILE}")
    except DamagedRecordError:
        return None


def newest_step(url: str) -> int | None:
    """Return the step of the newest complete checkpoint in a run's folder of them, or None."""
    filesystem, root = open_storage(url)
    return _newest_step(filesystem, root)


def num_parts(url: str) -> int:
    """Return how many parts of a run, such as layers, have a complete checkpoint there."""
    filesystem, root = open_storage(url)
    folders = _folders(filesystem, root)
    parts = (folder for folder in folders if "/step-" not in folder and filesystem.isdir(folder))
    return sum(_newest_step(filesystem, part) is not None for part in parts)


def _newest_step(filesystem: fsspec.AbstractFileSystem, root: str) -> int | None:
    folders = _folders(filesystem, root)
    found = [good_manifest(filesystem, folder) for folder in folders if "/step-" in folder]
    return max((manifest.step for manifest in found if manifest), default=None)


def _folders(filesystem: fsspec.AbstractFileSystem, root: str) -> list[str]:
    if not filesystem.exists(root):
        return []
    return [str(path).rstrip("/") for path in filesystem.ls(root, detail=False)]
