"""Small JSON files of a store, each with a checksum of itself: one that was changed is known as damaged.

    {"holder": {...}, "renewed": 3, ..., "checksum": sha256 of all the rest as canonical JSON}

Canonical JSON is what `json.dumps` writes with sorted keys and no spaces. A file without a checksum is of
an earlier version, and is taken as it is where its fields are those that are asked.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from inspect import get_annotations
from typing import Annotated, Any, Literal, TypeVar

import fsspec
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.storage.filesystems import create_json, put_json

_CHECKSUM = "checksum"
_Record = TypeVar("_Record")


class DamagedRecordError(ValueError):
    """A file that is there, and is not what was written.

    Attributes:
        url: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(url, reason)  # exceptions cross process borders by their arguments

    def __str__(self) -> str:
        return f"{self.url} is damaged: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class FailureNote:
    """Why the run of a key failed last."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class DamageNote:
    """How the files of an attempt differ from what was committed, by name; there is one at least."""

    problems: Annotated[dict[str, str], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class HardwareChoice:
    """What `auto` came to when a run began."""

    gpus_per_worker: Literal[0, 1]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]


def canonical_checksum(values: dict[str, Any]) -> str:
    """Return the sha256 of values as canonical JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parsed_object(raw: bytes, url: str) -> tuple[dict[str, Any], str | None]:
    """Return a JSON object without its checksum, which is right, and the checksum if there is one.

    Args:
        raw: the file's bytes.
        url: of the file, for the error.

    Raises:
        DamagedRecordError: if it is no JSON object, or was changed since it was written.
    """
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedRecordError(url, f"no JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise DamagedRecordError(url, f"holds a JSON {type(values).__name__}, not an object")
    given = values.pop(_CHECKSUM, None)
    if given is not None and given != canonical_checksum(values):
        raise DamagedRecordError(url, "it was changed after it was written (another checksum)")
    return values, given


def read_record(
    filesystem: fsspec.AbstractFileSystem,
    path: str,
    kind: type[_Record],
    *,
    needs_checksum: bool = False,
) -> _Record | None:
    """Return what a file holds; None where there is none.

    Args:
        filesystem: of the file.
        path: of the file.
        kind: a dataclass, whose fields the file has.
        needs_checksum: whether one without a checksum is damaged.

    Raises:
        DamagedRecordError: if it is not what was written.
    """
    try:
        raw = filesystem.cat_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise DamagedRecordError(path, "is a folder") from error
    values, checksum = parsed_object(raw, path)
    unknown = sorted(values.keys() - get_annotations(kind).keys())
    if checksum is None and (needs_checksum or unknown):
        reason = "has no checksum" if needs_checksum else f"{unknown[0]!r} is none of its fields"
        raise DamagedRecordError(path, reason)
    try:
        record: _Record = TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedRecordError(path, f"{where}: {first['msg']}".removeprefix(": ")) from error
    return record


def put_record(filesystem: fsspec.AbstractFileSystem, path: str, record: Any) -> None:
    """Write a dataclass in one put: a reader sees all of it or nothing."""
    put_json(filesystem, path, _sealed(record))


def create_record(filesystem: fsspec.AbstractFileSystem, path: str, record: Any) -> bool:
    """Write a dataclass to a path at which there is nothing; False if there is something already."""
    return create_json(filesystem, path, _sealed(record))


def _sealed(record: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    return {**values, _CHECKSUM: canonical_checksum(values)}
