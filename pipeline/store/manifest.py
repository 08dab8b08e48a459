"""The manifest of an artifact: a JSON object with a checksum of itself, and what makes it a damaged one.

    {"format": 2, "stage": ..., "key": ..., "url": ..., "seconds": ..., "files": {...}, "metrics": {...},
     "params": {...}, "inputs": {...}, "checksum": sha256 of all the rest as canonical JSON}

Canonical JSON is what `json.dumps` writes with sorted keys and no spaces. Manifests of before format 2
have neither `format` nor `checksum`: their metrics are taken as they are.
"""

import json
from math import isfinite
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.storage import checksums
from pipeline.storage.records import DamagedRecordError, canonical_checksum

FORMAT = 2


class DamagedManifestError(DamagedRecordError):
    """A manifest that is there, and is not what was written."""


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as it is read back, with its format and its checksum."""
    written: dict[str, Any] = json.loads(json.dumps({**values, "format": FORMAT}))
    return {**written, "checksum": canonical_checksum(written)}


def read_manifest(raw: bytes, url: str) -> dict[str, Any]:
    """Return what a manifest says, without its format; `checksum` is None in one of before format 2.

    Args:
        raw: the file's bytes.
        url: of the file, for the error.

    Raises:
        DamagedManifestError: if it is no manifest, or was changed since it was written.
    """
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedManifestError(url, f"no JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise DamagedManifestError(url, f"holds a JSON {type(values).__name__}, not an object")
    if isinstance(values.get("format"), int) and values["format"] > FORMAT:
        reason = f"its format is {values['format']}: a newer mgpp wrote it"
        raise DamagedManifestError(url, reason)
    given = values.get("checksum")
    rest = {name: value for name, value in values.items() if name != "checksum"}
    if given is not None and given != canonical_checksum(rest):
        raise DamagedManifestError(url, "it was changed after it was written (another checksum)")
    try:
        _Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedManifestError(url, f"{where}: {first['msg']}".removeprefix(": ")) from error
    return {**{name: rest[name] for name in rest if name != "format"}, "checksum": given}


def _inside(name: str) -> str:
    """Check a path that must lie below a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{name!r} is no path below a folder")
    return name


def _one_part(name: str) -> str:
    if len(PurePosixPath(_inside(name)).parts) != 1:
        raise ValueError(f"{name!r} is more than a name")
    return name


def _finite(number: float) -> float:
    if not isfinite(number):
        raise ValueError("not a finite number")
    return number


_Name = Annotated[str, AfterValidator(_one_part)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _File(_Strict):
    bytes: Annotated[int, Field(ge=0)]
    blocks: list[_Sha256] | None = None
    sha256: _Sha256 | None = None

    @model_validator(mode="after")
    def _has_one_checksum(self) -> "_File":
        if (self.blocks is None) == (self.sha256 is None):
            raise ValueError("not one of blocks and sha256")
        if self.blocks is not None and len(self.blocks) != -(-self.bytes // checksums.BLOCK_BYTES):
            raise ValueError(f"{len(self.blocks)} blocks do not make {self.bytes} bytes")
        return self


class _Manifest(_Strict):
    stage: _Name
    key: _Name
    url: _Name
    seconds: Annotated[float, Field(ge=0), AfterValidator(_finite)]
    files: dict[Annotated[str, AfterValidator(_inside)], _File]
    metrics: dict[str, Any]
    params: dict[str, Any]
    inputs: dict[str, str]
    format: int | None = None
    checksum: _Sha256 | None = None

    @model_validator(mode="after")
    def _is_of_one_format(self) -> "_Manifest":
        has_blocks = any(file.blocks is not None for file in self.files.values())
        marks = {self.format is not None, self.checksum is not None}
        if len(marks) != 1 or (has_blocks and self.checksum is None):
            raise ValueError("its format or its checksum is missing")
        return self
