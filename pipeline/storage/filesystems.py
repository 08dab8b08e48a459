"""Where artifacts and checkpoints lie: a local or shared folder, or any fsspec URL (s3://, gs://)."""

import errno
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, Problem

# As long as the paths of artifacts' files become below a storage.
_LONGEST_INNER = f"evaluate/{'0' * 64}/a-{'0' * 32}/{'0' * 100}"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_ALLOWED = ("a folder", "s3://BUCKET/PATH", "gs://BUCKET/PATH", "another URL that fsspec writes to")
_UNFIT = {
    "http": "can only be read",
    "https": "can only be read",
    "memory": "is gone with the process that writes it, and no other process sees it",
}
_LOCAL = ("file://", "local://")
_ONE_SLASH = re.compile(r"(?P<protocol>[a-z][a-z0-9+]*):/(?!/)")
_CAUSES = {
    errno.EROFS: "it is read-only",
    errno.ENOSPC: "it is full",
    errno.EDQUOT: "the quota is used up",
}
_TRIAL_BYTES = 4096


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
        ConfigError: if it names no place that can be storage.
    """
    problem = _form_problem(storage)
    if problem is not None:
        raise ConfigError([problem])
    folder = _folder_of(storage)
    return storage if folder is None else str(folder.expanduser().resolve())


def storage_problems(storage: str) -> list[Problem]:
    """Try whether files can be written, read and deleted in storage; return what is wrong.

    A small file is written to it, or to the nearest folder above it that exists, and deleted.
    """
    problem = _form_problem(storage) or _trial_problem(storage)
    return [] if problem is None else [problem]


def storage_error_text(error: Exception) -> str:
    """Return in words why storage could not be used."""
    if isinstance(error, NotImplementedError):
        return "it takes no files"
    if isinstance(error, PermissionError):
        return f"no right to ({_text_of(error)})"
    code = error.errno if isinstance(error, OSError) else None
    cause = _CAUSES.get(code or 0)
    return f"{cause} ({_text_of(error)})" if cause else _text_of(error)


def _text_of(error: Exception) -> str:
    """Return an error's text in one line, without the name of the file that was tried."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _folder_of(storage: str) -> Path | None:
    """Return the folder that storage names, as it is given; None for a URL of another file system."""
    for prefix in _LOCAL:
        storage = storage.removeprefix(prefix)
    return None if "://" in storage else Path(storage)


def _form_problem(storage: str) -> Problem | None:
    """Return why storage names no place that can be storage, whatever is there."""
    protocol, is_url, rest = storage.partition("://")
    one_slash = _ONE_SLASH.match(storage)
    if not storage.strip():
        why = "is empty"
    elif one_slash and one_slash["protocol"] in fsspec.available_protocols():
        why = "a URL has two slashes after its colon"
    else:
        why = _url_fault(protocol, rest) if is_url else ""
    if why:
        return Problem("storage", why, got=storage, allowed=_ALLOWED)
    folder = _folder_of(storage)
    return None if folder is None else _path_problem(storage, folder)


def _url_fault(protocol: str, rest: str) -> str:
    if protocol in _UNFIT:
        return f"{protocol}:// {_UNFIT[protocol]}"
    if protocol not in fsspec.available_protocols():  # chained ones, too: they hide others' files
        return "no such kind of storage"
    if not rest.strip("/"):
        return "names no bucket or folder"
    is_relative = f"{protocol}://" in _LOCAL and not rest.startswith("/")
    return "a folder's URL has three slashes: file:///FOLDER" if is_relative else ""


def _trial_problem(storage: str) -> Problem | None:
    """Return why a file cannot be written, read and deleted in storage."""
    protocol = storage.partition("://")[0]
    try:
        filesystem, place = open_storage(storage)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'mgpp[{extra}]'" if extra else f"{error}"
        return Problem("storage", f"{protocol}:// needs a package that is not installed: {how}")
    except Exception as error:  # noqa: BLE001  # every storage raises its own
        return Problem("storage", f"{storage} cannot be reached: {storage_error_text(error)}")
    if is_local(filesystem):
        return _folder_problem(storage, filesystem, Path(place))
    fault = _fault_of(filesystem, place)
    if fault and protocol in _EXTRAS:
        bucket = place.partition("/")[0]
        if _is_missing(filesystem, bucket):
            return Problem("storage", f"{storage}: there is no bucket {bucket!r}")
    return Problem("storage", f"{storage} cannot be written: {fault}") if fault else None


def _is_missing(filesystem: fsspec.AbstractFileSystem, bucket: str) -> bool:
    """Return whether storage says so: `exists` is False of a server that does not answer, too."""
    try:
        filesystem.ls(bucket, detail=False)
    except Exception as error:  # noqa: BLE001  # every storage raises its own
        return isinstance(error, FileNotFoundError)
    return False


def _folder_problem(
    storage: str, filesystem: fsspec.AbstractFileSystem, folder: Path
) -> Problem | None:
    """Return why a file cannot be written in a folder, or where it would have to be made."""
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        return Problem("storage", f"{storage} cannot be made: {there} is not a folder")
    fault = _fault_of(filesystem, str(there))
    where = "" if there == folder else f"{there}: "
    return Problem("storage", f"{storage} cannot be written: {where}{fault}") if fault else None


def _fault_of(filesystem: fsspec.AbstractFileSystem, folder: str) -> str:
    """Return what a folder lacks of what runs need, found with a small file that is deleted again."""
    path, trial = f"{folder.rstrip('/')}/.mgpp-trial-{uuid.uuid4().hex}", "0" * _TRIAL_BYTES
    fault = ""
    try:
        create_json(filesystem, path, trial)
        if create_json(filesystem, path, trial):
            fault = "files are overwritten where they should be refused, so leases would not hold"
        elif read_json(filesystem, path) != trial:
            fault = "what is read is not what was written"
    except Exception as error:  # noqa: BLE001  # every storage raises its own
        fault = storage_error_text(error)
    try:
        if filesystem.exists(path):
            filesystem.rm(path)
    except Exception as error:  # noqa: BLE001
        fault = fault or f"files cannot be deleted: {storage_error_text(error)}"
    return fault


def _path_problem(storage: str, folder: Path) -> Problem | None:
    """Return why a file system does not take a folder's path, nor those of files below it."""
    why = ""
    try:
        os.lstat(folder.expanduser().absolute() / _LONGEST_INNER)
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
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def create_json(filesystem: fsspec.AbstractFileSystem, path: str, value: Any) -> bool:
    """Write JSON to a path at which there is nothing; return False if there is something already.

    Of several that try at once one succeeds (S3: `If-None-Match`; Google: `ifGenerationMatch`).
    """
    data = _encoded(value)
    try:
        if is_local(filesystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _create_file(Path(path), data)
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


def _create_file(path: Path, data: bytes) -> None:
    """Write a file at which there is nothing; of one that could not be written, nothing is left."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
        except OSError:
            path.unlink()
            raise


def _encoded(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
