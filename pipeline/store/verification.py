"""What a store holds, read whole and compared with the checksums of its manifests."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import fsspec

from pipeline.storage.checksums import problem
from pipeline.storage.filesystems import open_storage
from pipeline.store.checkpoint_manifest import good_manifest
from pipeline.store.maintenance import Entry


def verified(entry: Entry) -> Entry:
    """Read the files of a finished artifact and of complete checkpoints.

    Returns:
        The entry with those that are missing or changed. A checkpoint that its run has deleted meanwhile
        is not damaged.
    """
    damage = dict(entry.damage)
    if entry.artifact is not None:
        filesystem, root = open_storage(entry.artifact.url)
        damage |= _differences(filesystem, root, entry.artifact.files, root.rpartition("/")[2])
    filesystem, root = open_storage(entry.url)
    for name in entry.checkpoints:
        folder = f"{root}/{name}"
        manifest = good_manifest(filesystem, folder)
        if manifest is None:
            continue  # deleted, or it is damaged itself, which is known
        found = _differences(filesystem, folder, manifest.files, name)
        if found and good_manifest(filesystem, folder) is not None:  # its manifest is deleted first
            damage |= found
    return replace(entry, damage=damage)


def _differences(
    filesystem: fsspec.AbstractFileSystem,
    root: str,
    files: Mapping[str, Mapping[str, Any]],
    folder: str,
) -> dict[str, str]:
    """Return how files below a path differ from their entries, by their path in a key's folder."""
    found = {}
    for name, expected in files.items():
        try:
            with filesystem.open(f"{root}/{name}", "rb") as file:
                how = problem(file, expected)
        except FileNotFoundError:
            found[f"{folder}/{name}"] = "is missing"
            continue
        if how:
            found[f"{folder}/{name}"] = f"has {how}"
    return found
