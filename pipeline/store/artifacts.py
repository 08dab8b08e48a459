"""The artifact store: what a stage made, under a key that names all that went into it.

    <storage>/<stage>-<key>/a-<uuid>/...     what one attempt wrote
    <storage>/<stage>-<key>/_DONE.json       written last, in one put: which attempt, files, checksums
    <storage>/<stage>-<key>/checkpoints/     of a training stage, for the next attempt to resume from

A key with `_DONE.json` is never run again; one without it is as if nothing had been done. Storage is a
local folder or any fsspec URL.
"""

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.store.storage import is_local, open_storage, put_json, read_json

DONE_FILE, FAILED_FILE = "_DONE.json", "_FAILED.json"
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One finished output of a stage.

    Attributes:
        stage: the stage's name.
        key: hexadecimal name of all that went into it.
        url: the folder that holds its files.
        seconds: wall seconds the stage took when it ran.
        files: size in bytes and sha256 by relative path.
        metrics: figures the stage reported.
        params: what the key was made of, defaults included.
        inputs: keys of the input artifacts, by stage.
    """

    stage: str
    key: str
    url: str
    seconds: float
    files: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    params: dict[str, Any]
    inputs: dict[str, str]

    @property
    def path(self) -> Path:
        """The folder on this machine; fetched from remote storage once, to a temporary cache."""
        filesystem, root = open_storage(self.url)
        if is_local(filesystem):
            return Path(root)
        cache = Path(tempfile.gettempdir()) / "mgpp-artifacts" / f"{self.key}-{Path(root).name}"
        if not cache.exists():
            fetched = Path(tempfile.mkdtemp(prefix="fetch-", dir=_made(cache.parent)))
            filesystem.get(root.rstrip("/") + "/", str(fetched / "files") + "/", recursive=True)
            try:
                (fetched / "files").rename(cache)
            except OSError:  # another worker of this machine was first
                shutil.rmtree(fetched)
        return cache

    def weight_bytes(self, folder: str) -> int:
        """Return the bytes of the model weights in one of its folders; 0 if it has none."""
        return sum(
            entry["bytes"]
            for name, entry in self.files.items()
            if name.startswith(f"{folder}/") and name.endswith(".safetensors")
        )

    def read_text(self, name: str) -> str:
        """Return what one of its files holds, without fetching the others."""
        filesystem, root = open_storage(self.url)
        return bytes(filesystem.cat_file(f"{root.rstrip('/')}/{name}")).decode()


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A stage at work: a local folder to write to, which becomes an artifact on `commit`."""

    store: "ArtifactStore"
    stage: str
    key: str
    url: str
    folder: Path
    params: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    streamed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, files: Mapping[str, dict[str, Any]]) -> None:
        """Add files that workers wrote straight to storage: their entries by relative path."""
        self.streamed.update(files)

    def commit(self, metrics: dict[str, Any], seconds: float) -> Artifact:
        """Upload if storage is remote, then write the manifest last: only now is it an artifact."""
        files = {
            path.relative_to(self.folder).as_posix(): _describe(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.relative_to(self.folder).as_posix() not in self.streamed
        }
        self.store.upload(self.folder, self.url)
        manifest = {
            "stage": self.stage,
            "key": self.key,
            "url": self.url.rsplit("/", 1)[-1],
            "seconds": round(seconds, 3),
            "files": dict(sorted((files | self.streamed).items())),
            "metrics": metrics,
            "params": self.params,
            "inputs": self.inputs,
        }
        self.store.put_manifest(self.stage, self.key, manifest)
        artifact = self.store.find(self.stage, self.key)
        assert artifact is not None
        return artifact


class ArtifactStore:
    """Artifacts on one storage root.

    Args:
        url: a local path or an fsspec URL.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = open_storage(url)
        self.is_local = is_local(self._fs)
        self.url = self._fs.unstrip_protocol(self._root) if not self.is_local else self._root

    def folder_of(self, stage: str, key: str) -> str:
        """Return the URL of the folder in which all attempts at a key lie."""
        return f"{self.url.rstrip('/')}/{stage}-{key}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the finished artifact of a key, or None."""
        return self.read(f"{self.folder_of(stage, key)}/{DONE_FILE}")

    def read(self, manifest_url: str) -> Artifact | None:
        """Return the artifact a manifest describes, or None where there is no manifest."""
        manifest = read_json(self._fs, self._strip(manifest_url))
        if manifest is None:
            return None
        folder = manifest_url.rsplit("/", 1)[0]
        return Artifact(**{**manifest, "url": f"{folder}/{manifest['url']}"})

    def begin(
        self, stage: str, key: str, params: dict[str, Any], inputs: Mapping[str, Artifact]
    ) -> Attempt:
        """Start an attempt at a key: a fresh folder, local even where storage is not."""
        name = f"a-{uuid.uuid4().hex[:12]}"
        url = f"{self.folder_of(stage, key)}/{name}"
        local = _made(Path(url)) if self.is_local else None
        folder = local or Path(tempfile.mkdtemp(prefix=f"mgpp-{stage}-"))
        keys = {name: artifact.key for name, artifact in inputs.items()}
        return Attempt(
            store=self, stage=stage, key=key, url=url, folder=folder, params=params, inputs=keys
        )

    def upload(self, folder: Path, url: str) -> None:
        """Copy a local folder to storage; nothing to do where storage is local."""
        if not self.is_local:
            self._fs.put(f"{folder}/", self._strip(url) + "/", recursive=True)
            shutil.rmtree(folder)

    def discard(self, url: str) -> None:
        """Delete a folder that is no longer needed; it may be missing."""
        path = self._strip(url)
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    def put_manifest(self, stage: str, key: str, manifest: dict[str, Any]) -> None:
        """Write the manifest that makes an attempt an artifact."""
        put_json(self._fs, self._strip(f"{self.folder_of(stage, key)}/{DONE_FILE}"), manifest)

    def note_failure(self, stage: str, key: str, reason: str) -> None:
        """Note beside a key why its run failed last; an empty reason takes the note away."""
        path = self._strip(f"{self.folder_of(stage, key)}/{FAILED_FILE}")
        if reason:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            put_json(self._fs, path, {"reason": reason})
        elif self._fs.exists(path):
            self._fs.rm(path)

    def failure(self, stage: str, key: str) -> str | None:
        """Return why a key's run failed last, or None."""
        path = self._strip(f"{self.folder_of(stage, key)}/{FAILED_FILE}")
        found = read_json(self._fs, path)
        return None if found is None else str(found["reason"])

    def _strip(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))


def make_key(stage: str, version: int, params: Any, inputs: Mapping[str, str]) -> str:
    """Name an artifact by the stage, its code's version, its parameters and its inputs' keys.

    Returns:
        The first 16 hexadecimal digits of a sha256.
    """
    named = {"stage": stage, "version": version, "params": params, "inputs": dict(inputs)}
    text = json.dumps(named, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_artifact(path: str) -> Artifact:
    """Return the artifact at a path: a key's folder, an attempt's folder or the manifest itself.

    Raises:
        FileNotFoundError: if there is no finished artifact.
    """
    url = path.rstrip("/") if "://" in path else str(Path(path).expanduser().resolve())
    url = url.removesuffix(f"/{DONE_FILE}")
    parent, _, name = url.rpartition("/")
    for folder in (url, parent):
        artifact = ArtifactStore(folder).read(f"{ArtifactStore(folder).url}/{DONE_FILE}")
        # Another attempt's manifest may lie beside an attempt that was given up.
        if artifact is not None and (folder == url or artifact.url.endswith(f"/{name}")):
            return artifact
    raise FileNotFoundError(f"{path}: no finished artifact here (no {DONE_FILE})")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return stream_sha256(file)[0]


def stream_sha256(file: BinaryIO) -> tuple[str, int]:
    """Return the sha256 and the number of bytes of what is left of a file."""
    digest, size = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
