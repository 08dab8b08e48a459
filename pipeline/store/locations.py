"""Where models and data come from: paths inside installed packages, and what identifies a file."""

import hashlib
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from pipeline.storage.checksum_cache import content_checksum
from pipeline.storage.node_copies import DamagedArtifactError
from pipeline.storage.records import DamagedRecordError
from pipeline.store.artifacts import open_artifact

_PACKAGE = "package:"
ARTIFACT = "artifact:"


def resolve_path(path: str) -> str:
    """Turn `package:NAME/inner/path` into the file's path; return any other path as it is.

    `artifact:URL/NAME` is the folder NAME of an artifact, fetched from remote storage once a machine.

    Raises:
        ValueError: if the package is not installed or has no such file, or there is no such artifact, or
            it is not what was committed.
    """
    if path.startswith(ARTIFACT):
        url, _, inner = path.removeprefix(ARTIFACT).rpartition("/")
        try:
            return str(open_artifact(url).path / inner)
        except (FileNotFoundError, DamagedRecordError, DamagedArtifactError) as error:
            raise ValueError(str(error)) from error
    if not path.startswith(_PACKAGE):
        return path
    name, _, inner = path.removeprefix(_PACKAGE).partition("/")
    try:
        top, *below = name.split(".")
        spec = find_spec(top) if top else None
        for part in below:  # found without importing the packages above, as `find_spec` would
            within = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(part, list(within)) if part and within else None
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
    """Return a sha256 of a file, or of all files of a folder with their names.

    Files that did not change since any process of this machine read them are not read again.
    """
    if not path.is_dir():
        return content_checksum(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{content_checksum(file)}\n".encode())
    return digest.hexdigest()
