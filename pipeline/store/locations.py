"""Where models and data come from: paths inside installed packages, and what identifies a file."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pipeline.store.artifacts import file_sha256, open_artifact
from pipeline.store.records import DamagedFileError

_PACKAGE = "package:"
ARTIFACT = "artifact:"


def resolve_path(path: str) -> str:
    """Turn `package:NAME/inner/path` into the file's path; return any other path as it is.

    `artifact:URL/NAME` is the folder NAME of an artifact, fetched from remote storage once.

    Raises:
        ValueError: if the package is not installed or has no such file, or there is no such artifact.
    """
    if path.startswith(ARTIFACT):
        url, _, inner = path.removeprefix(ARTIFACT).rpartition("/")
        try:
            return str(open_artifact(url).path / inner)
        except (FileNotFoundError, DamagedFileError) as error:
            raise ValueError(str(error)) from error
    if not path.startswith(_PACKAGE):
        return path
    name, _, inner = path.removeprefix(_PACKAGE).partition("/")
    try:
        spec = find_spec(name) if name else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: package {name!r} is not installed; `pip install` it")
    found = Path(next(iter(spec.submodule_search_locations))) / inner
    if not found.exists():
        raise ValueError(f"{path}: package {name!r} has no {inner!r}")
    return str(found)


def is_file(path: Path | str) -> bool:
    """Return whether there is a file at a path, which may be none that a file system takes."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long, a null byte
        return False


def content_sha256(path: Path) -> str:
    """Return a sha256 of a file, or of all files of a folder with their names."""
    if not path.is_dir():
        return _sha256(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    """Read a file once a process, however many keys it goes into; a changed one is read again."""
    return file_sha256(path)
