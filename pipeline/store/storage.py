"""Where artifacts and checkpoints lie: a local or shared folder, or any fsspec URL (s3://, gs://)."""

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, Problem

# As long as the paths of artifacts' files become below a storage.
_LONGEST_INNER = f"evaluate/{'0' * 64}/a-{'0' * 32}/{'0' * 100}"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def open_storage(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return a URL's file system and the path in it.

    Listings are not cached: other machines write to the same storage.

    Raises:
        ImportError: if the protocol needs a package that is not installed.
        ValueError: if the protocol is unknown.
    """
    filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return filesystem, str(path)


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Tell whether files lie in folders of this machine, mounted ones among them."""
    return isinstance(filesystem, LocalFileSystem)


def absolute_url(storage: str) -> str:
    """Return a local folder's absolute path (other processes work elsewhere), a URL as it is.

    Raises:
        ConfigError: if no file system takes such a path.
    """
    if "://" in storage:
        return storage
    problem = _path_problem(storage)
    if problem is not None:
        raise ConfigError([problem])
    return str(Path(storage).expanduser().resolve())


def storage_problems(storage: str) -> list[Problem]:
    """Return whether storage cannot be used: a folder that cannot be written, a URL not reached."""
    if "://" in storage:
        return _url_problems(storage)
    problem = _path_problem(storage)
    if problem is not None:
        return [problem]
    folder = Path(storage).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [Problem("storage", f"{storage} cannot be made: {folder} is not a folder")]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [
            Problem("storage", f"{storage} cannot be written: {folder} is read-only for this user")
        ]
    return []


def _path_problem(storage: str) -> Problem | None:
    """Return why a file system does not take a folder's path, nor those of files below it."""
    why = ""
    try:
        os.lstat(Path(storage).expanduser().absolute() / _LONGEST_INNER)
    except (ValueError, RuntimeError) as error:  # a null byte, no such user
        why = str(error)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno == errno.ENAMETOOLONG else ""
    return (
        Problem("storage", f"no file system takes this path: {why}", got=storage) if why else None
    )


def put_json(filesystem: fsspec.AbstractFileSystem, path: str, value: Any) -> None:
    """Write JSON in one put: a reader sees all of it or nothing."""
    data = _encoded(value)
    if not is_local(filesystem):
        filesystem.pipe_file(path, data)
        return
    beside = Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp")
    beside.write_bytes(data)
    beside.replace(path)


def create_json(filesystem: fsspec.AbstractFileSystem, path: str, value: Any) -> bool:
    """Write JSON to a path at which there is nothing; return False if there is something already.

    Of several that try at once one succeeds (S3: `If-None-Match`; Google: `ifGenerationMatch`).
    """
    data = _encoded(value)
    try:
        if is_local(filesystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with Path(path).open("xb") as file:
                file.write(data)
        else:
            filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def read_json(filesystem: fsspec.AbstractFileSystem, path: str) -> Any:
    """Return what a JSON file holds, or None where there is none or it is not all written yet."""
    try:
        return json.loads(filesystem.cat_file(path))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _encoded(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _url_problems(storage: str) -> list[Problem]:
    protocol = storage.partition("://")[0]
    try:
        filesystem, path = open_storage(storage)
        bucket = path.partition("/")[0]
        if protocol in _EXTRAS and not filesystem.exists(bucket):
            return [Problem("storage", f"{storage}: there is no bucket {bucket!r}")]
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'mgpp[{extra}]'" if extra else f"{error}"
        return [Problem("storage", f"{protocol}:// needs a package that is not installed: {how}")]
    except Exception as error:  # noqa: BLE001  # every storage raises its own
        return [Problem("storage", f"{storage} cannot be reached: {' '.join(str(error).split())}")]
    return []
