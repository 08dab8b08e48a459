"""The store as a process on a node of the cluster reads it: a node may lack what the driver has."""

import platform

from pipeline.errors import ConfigError, StageError
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.maintenance import readable_store


def store_on_this_node(storage: str) -> ArtifactStore:
    """Return the store, after a try to read it from here.

    Args:
        storage: its URL, which the driver can read.

    Raises:
        StageError: if this node has no credentials, or not the right to it, or lacks a library.
        RuntimeError: if it cannot be read now; a retry may.
    """
    try:
        return readable_store(storage)
    except ConfigError as error:
        text = f"node {platform.node()}: {error.problems[0].why}"
        if _is_refusal(error.__cause__):
            raise StageError(
                f"{text}; every node needs the credentials and libraries that the driver has"
            ) from error
        raise RuntimeError(text) from error


def _is_refusal(error: BaseException | None) -> bool:
    """Return whether storage said no, or was not asked; those who say so have no base in common."""
    if error is None:  # what is missing here was found before storage was asked
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (PermissionError, ImportError)) or any(
        "Credential" in n for n in names
    )
