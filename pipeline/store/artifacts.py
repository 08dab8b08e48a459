"""The artifact store: what a stage made, under a key that names all that went into it.

    <storage>/<stage>-<key>/a-<uuid>/...     what one attempt wrote
    <storage>/<stage>-<key>/_DONE.json       written last, in one put: which attempt, files, checksums
    <storage>/<stage>-<key>/a-<uuid>/_DAMAGED.json   noted since: its files are not what was committed
    <storage>/<stage>-<key>/checkpoints/     of a training stage, for the next attempt to resume from

A key with `_DONE.json` is never run again; one without it is as if nothing had been done. Storage is a
local folder or any fsspec URL.
"""

import hashlib
import io
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.storage.checksum_cache import description
from pipeline.storage.checksums import problem
from pipeline.storage.filesystems import is_local, open_storage, put_json
from pipeline.storage.node_copies import (
    DamagedArtifactError,
    described,
    local_folder,
    new_copy,
    sizes_problem,
)
from pipeline.storage.records import (
    DamagedRecordError,
    DamageNote,
    FailureNote,
    put_record,
    read_record,
)
from pipeline.store.manifest import DamagedManifestError, read_manifest, sealed

DONE_FILE, FAILED_FILE, _DAMAGED_FILE = "_DONE.json", "_FAILED.json", "_DAMAGED.json"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One finished output of a stage.

    Attributes:
        stage: the stage's name.
        key: hexadecimal name of all that went into it.
        url: the folder that holds its files.
        seconds: wall seconds the stage took when it ran.
        files: by relative path: size in bytes, and sha256 of each block (see `checksums`).
        metrics: figures the stage reported.
        params: what the key was made of, defaults included.
        inputs: keys of the input artifacts, by stage.
        checksum: of the manifest; None in one that an earlier version wrote.
    """

    stage: str
    key: str
    url: str
    seconds: float
    files: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    params: dict[str, Any]
    inputs: dict[str, str]
    checksum: str | None = None

    @property
    def path(self) -> Path:
        """The folder on this machine with all that stages read, fetched and checked once a machine.

        Raises:
            DamagedArtifactError: if a file is not what was committed.
            StageError: if there is no room for a copy.
        """
        return local_folder(self.url, self.files)

    def weight_bytes(self, folder: str) -> int:
        """Return the bytes of the model weights in one of its folders; 0 if it has none."""
        return sum(
            entry["bytes"]
            for name, entry in self.files.items()
            if name.startswith(f"{folder}/") and name.endswith(".safetensors")
        )

    def read_text(self, name: str) -> str:
        """Return what one of its files holds, without fetching the others.

        Raises:
            DamagedArtifactError: if it is not what was committed.
        """
        filesystem, root = open_storage(self.url)
        try:
            data = bytes(filesystem.cat_file(f"{root.rstrip('/')}/{name}"))
        except FileNotFoundError as error:
            raise DamagedArtifactError(self.url, {name: "is missing"}) from error
        wrong = problem(io.BytesIO(data), self.files[name])
        if wrong:
            raise DamagedArtifactError(self.url, {name: f"has {wrong}"})
        return data.decode()


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A stage at work: a local folder to write to, which becomes an artifact on `commit`.

    Where storage is remote, the folder stays as this machine's copy.
    """

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
        _let_group_read(self.folder)
        files = {
            path.relative_to(self.folder).as_posix(): description(path)
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
        self.store.put_manifest(self.stage, self.key, sealed(manifest))
        artifact = self.store.find(self.stage, self.key)
        assert artifact is not None, self.store.damage(self.stage, self.key)
        return artifact


def _let_group_read(folder: Path) -> None:
    """Give files the rights of their folder, which the umask made: safetensors gives its owner alone."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            mode = path.stat().st_mode
            wanted = mode | (path.parent.stat().st_mode & 0o666)
            if wanted != mode:
                path.chmod(wanted)


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
        """Return the finished artifact of a key; None where there is none, or a damaged one.

        Its files are there with their sizes; what they hold is checked where they are read.
        """
        return self._look(stage, key)[0]

    def damage(self, stage: str, key: str) -> str:
        """Return why what lies at a key does not count as finished; "" if it does or none is there."""
        return self._look(stage, key)[1]

    def condemn(self, url: str, problems: Mapping[str, str]) -> None:
        """Note in an attempt's folder that its files are not what was committed: it counts no longer."""
        note = DamageNote(problems=dict(problems))
        put_record(self._fs, f"{self._strip(url)}/{_DAMAGED_FILE}", note)

    def _look(self, stage: str, key: str) -> tuple[Artifact | None, str]:
        """Return the finished artifact of a key, or why there is none although something is there."""
        try:
            found = self.read(f"{self.folder_of(stage, key)}/{DONE_FILE}")
        except DamagedManifestError as error:
            return None, f"{DONE_FILE}: {error.reason}"
        if found is None:
            return None, ""
        if (found.stage, found.key) != (stage, key):
            return None, f"{DONE_FILE} is of {found.stage}-{found.key}"
        root = self._strip(found.url)
        there = self._fs.find(root, detail=True)
        sizes = {str(path)[len(root) + 1 :]: int(info["size"]) for path, info in there.items()}
        if _DAMAGED_FILE in sizes:
            try:
                noted = read_record(self._fs, f"{root}/{_DAMAGED_FILE}", DamageNote)
            except DamagedRecordError:
                noted = None
            return None, described(noted.problems) if noted else f"{_DAMAGED_FILE} says so"
        problems = sizes_problem(sizes, found.files)
        return (None, described(problems)) if problems else (found, "")

    def read(self, manifest_url: str) -> Artifact | None:
        """Return the artifact that a manifest describes, or None where there is no manifest.

        Raises:
            DamagedManifestError: if it is not what was written.
        """
        try:
            raw = self._fs.cat_file(self._strip(manifest_url))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError as error:
            raise DamagedManifestError(manifest_url, "is a folder") from error
        return parse_manifest(raw, manifest_url)

    def begin(
        self, stage: str, key: str, params: dict[str, Any], inputs: Mapping[str, Artifact]
    ) -> Attempt:
        """Start an attempt at a key: a fresh folder, local even where storage is not."""
        name = f"a-{uuid.uuid4().hex[:12]}"
        url = f"{self.folder_of(stage, key)}/{name}"
        folder = _made(Path(url)) if self.is_local else new_copy(url)
        keys = {name: artifact.key for name, artifact in inputs.items()}
        return Attempt(
            store=self, stage=stage, key=key, url=url, folder=folder, params=params, inputs=keys
        )

    def upload(self, folder: Path, url: str) -> None:
        """Copy a local folder to storage; nothing to do where storage is local."""
        if not self.is_local:
            self._fs.put(f"{folder}/", self._strip(url) + "/", recursive=True)

    def discard(self, url: str) -> None:
        """Delete a folder that is no longer needed, here or on this machine; it may be missing."""
        filesystem, path = open_storage(url)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    def put_manifest(self, stage: str, key: str, manifest: dict[str, Any]) -> None:
        """Write the manifest that makes an attempt an artifact."""
        put_json(self._fs, self._strip(f"{self.folder_of(stage, key)}/{DONE_FILE}"), manifest)

    def note_failure(self, stage: str, key: str, reason: str) -> None:
        """Note beside a key why its run failed last; an empty reason takes the note away."""
        path = self._strip(f"{self.folder_of(stage, key)}/{FAILED_FILE}")
        if reason:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            put_record(self._fs, path, FailureNote(reason=reason))
        elif self._fs.exists(path):
            self._fs.rm(path)

    def failure(self, stage: str, key: str) -> str | None:
        """Return why a key's run failed last, or None where no failure is noted."""
        path = self._strip(f"{self.folder_of(stage, key)}/{FAILED_FILE}")
        try:
            found = read_record(self._fs, path, FailureNote)
        except DamagedRecordError as error:
            return f"{error}; why it failed is not known"
        return None if found is None else found.reason

    def _strip(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))


def parse_manifest(raw: bytes, url: str) -> Artifact:
    """Return the artifact that a manifest describes.

    Args:
        raw: the bytes of the manifest.
        url: where it lies, beside the attempt that it is of.

    Raises:
        DamagedManifestError: if it is no manifest, or was changed since it was written.
    """
    values = read_manifest(raw, url)
    return Artifact(**{**values, "url": f"{url.rpartition('/')[0]}/{values['url']}"})


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
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
