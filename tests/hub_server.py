"""A stand-in for the Hugging Face hub, on this machine: repositories to read and write, and failures."""

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

DROP = "drop"  # close the connection without an answer
_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?")
_PATHS = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)")
_PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)")
_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)")
_LFS = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_STORE = re.compile(r"/lfs-store/([0-9a-f]{64})")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """What the hub has, and how it answers.

    Attributes:
        url: of the server.
        commits: by kind ("models", "datasets") and name: folder of each commit's files, the newest last.
        branches: by kind, name and branch or tag: its commit; "main" is the newest.
        gated: names that need a token.
        answers: what comes instead of the next commits, and then of the next files if `everywhere`: a
            status, a status with headers, or DROP.
        everywhere: whether requests for files fail, too.
        asked: the commits that were asked for: kind, name, revision.
        sent: the files whose bodies were sent, in order.
        writers: tokens that may write; others that are given may only read.
        private: names that were made private.
        store: what was uploaded of large files, by sha256; they stay when an upload breaks off.
        uploaded: the sha256 of each large file that was received whole, in order.
        hold: called with the number of the large file, from 1, before it is received.
        messages: of the commits.
        folder: where the files of commits go.
    """

    url: str = ""
    commits: dict[tuple[str, str], dict[str, Path]] = field(default_factory=dict)
    branches: dict[tuple[str, str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    answers: list[Any] = field(default_factory=list)
    everywhere: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    writers: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    store: dict[str, bytes] = field(default_factory=dict)
    uploaded: list[str] = field(default_factory=list)
    hold: Callable[[int], None] = lambda number: None
    messages: list[str] = field(default_factory=list)
    folder: Path = Path()
    begun: Iterator[int] = field(default_factory=lambda: count(1))

    def add(self, kind: str, name: str, folder: Path) -> str:
        """Add a commit with the files of a folder; return its hash."""
        commit = hashlib.sha1(f"{kind} {name} {folder}".encode()).hexdigest()
        self.commits.setdefault((kind, name), {})[commit] = folder
        return commit

    def commit(self, kind: str, name: str, revision: str | None) -> str | None:
        """Return the commit of a revision, or None."""
        known = self.commits[kind, name]
        if revision in (None, "main"):
            return list(known)[-1]
        assert revision is not None
        return revision if revision in known else self.branches.get((kind, name, revision))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        """As for GET; `send` leaves the body out."""
        self.do_GET()

    def do_PUT(self) -> None:
        """Receive a large file."""
        digest = _STORE.fullmatch(urlsplit(self.path).path)[1]
        self.hub.hold(next(self.hub.begun))
        body = self.body()
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.store[digest] = body
        self.hub.uploaded.append(digest)
        self.send(200, {})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def may_write(self) -> bool:
        """Answer those without a token, and those who may only read."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.hub.writers:
            return True
        self.send(403 if token else 401, {"error": "no right to write"})
        return False

    def write(self, path: str, body: bytes) -> None:
        """Make a repository, or put something into one."""
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            if ("models", name) in self.hub.commits:
                return self.send(409, {"error": "You already created this model repo", "url": ""})
            if values.get("visibility") == "private" or values.get("private"):
                self.hub.private.add(name)
            self.put_commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, ())
            return self.send(200, {"url": f"{self.hub.url}/{name}"})
        if match := _PREUPLOAD.fullmatch(path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send(200, {"files": modes})
        if _LFS.fullmatch(path):
            objects = json.loads(body)["objects"]
            for each in objects:
                if each["oid"] not in self.hub.store:
                    href = f"{self.hub.url}/lfs-store/{each['oid']}"
                    each["actions"] = {"upload": {"href": href}}
            return self.send(200, {"transfer": "basic", "objects": objects})
        match = _COMMIT.fullmatch(path)
        added, deleted = {}, []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.hub.store[value["oid"]]
            else:
                deleted.append(value["path"])
        commit = self.put_commit(match[1], added, deleted)
        return self.send(200, {"commitUrl": f"{self.hub.url}/c/{commit}", "commitOid": commit})

    def put_commit(self, name: str, added: dict[str, bytes], deleted: Iterable[str]) -> str:
        known = self.hub.commits.get(("models", name), {})
        folder = self.hub.folder / name / str(len(known))
        folder.mkdir(parents=True)
        if known:
            shutil.copytree(list(known.values())[-1], folder, dirs_exist_ok=True)
        for path in deleted:
            (folder / path).unlink()
        for path, content in added.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return self.hub.add("models", name, folder)

    def do_POST(self) -> None:
        """Return what there is of the paths that are asked for; take what is written."""
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        written = (_PREUPLOAD, _COMMIT, _LFS)
        if path == "/api/repos/create" or any(each.fullmatch(path) for each in written):
            if self.may_write():
                self.write(path, body)
            return None
        match = _PATHS.fullmatch(path)
        found = self.folder(*match.groups()) if match else None
        if found is not None:
            try:
                asked = json.loads(body)["paths"]
            except ValueError:
                asked = re.findall(r"paths=([^&]+)", unquote(body.decode()))
            self.send(200, [entry for entry in entries(found[1]) if entry["path"] in asked])
        return None

    def do_GET(self) -> None:
        """Answer as the hub does, or as the test wants."""
        url = urlsplit(self.path)
        path = url.path
        if match := _INFO.fullmatch(path):
            kind, name, revision = (g and unquote(g) for g in match.groups())
            self.hub.asked.append((kind, name, revision))
            if not self.fails():
                self.send_info(kind, name, revision)
        elif self.hub.everywhere and self.fails():
            return
        elif match := _TREE.fullmatch(path):
            kind, name, revision = (unquote(g or "") for g in match.groups()[:3])
            if (found := self.folder(kind, name, revision)) is not None:
                self.send(200, entries(found[1]))
        elif match := _FILE.fullmatch(path):
            self.send_file(*(unquote(g or "") for g in match.groups()))
        else:
            self.send(404, {"error": "Not Found"})

    def fails(self) -> bool:
        if not self.hub.answers:
            return False
        answer = self.hub.answers.pop(0)
        if answer == DROP:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            self.send(status, {"error": "as the test wants"}, headers)
        return True

    def send_info(self, kind: str, name: str, revision: str | None) -> None:
        found = self.folder(kind, name, revision)
        if found:
            files = [{"rfilename": entry["path"]} for entry in entries(found[1])]
            values = {"private": name in self.hub.private, "siblings": files, "tags": []}
            self.send(200, {"id": name, "sha": found[0], **values})

    def folder(self, kind: str, name: str, revision: str | None) -> tuple[str, Path] | None:
        """Return commit and folder of a revision; answer that there is none."""
        if (kind, name) not in self.hub.commits:
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.hub.commit(kind, name, revision)
        if commit is None:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, self.hub.commits[kind, name][commit]

    def send_file(self, prefix: str, name: str, revision: str, file: str) -> None:
        if name in self.hub.gated and "Authorization" not in self.headers:
            return self.send(401, {"error": "restricted"}, {"X-Error-Code": "GatedRepo"})
        found = self.folder("datasets" if prefix else "models", name, revision)
        if found is None:
            return None
        commit, folder = found
        if not (folder / file).is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.send(404, {"error": "Entry not found"}, headers)
        body = (folder / file).read_bytes()
        if self.command == "GET":
            self.hub.sent.append(file)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self.send(200, body, {"X-Repo-Commit": commit, "ETag": etag})

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return a folder's files as the hub lists them."""
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest(),
            **({"lfs": pointer(path)} if is_large(path.name) else {}),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def is_large(name: str) -> bool:
    """Return whether the hub stores a file by its sha256, beside the repository."""
    return name.endswith((".safetensors", ".onnx"))


def pointer(path: Path) -> dict[str, Any]:
    """Return what the repository holds of a large file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"oid": digest, "size": path.stat().st_size, "pointerSize": 134}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub on loopback."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def online(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's libraries take a server for the hub, with an empty cache."""
    import datasets
    import transformers
    from huggingface_hub import constants

    from pipeline.storage import hub as ours

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(ours, "_WAITS", (0.0,) * len(ours._WAITS))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol; LFS is HTTP
    ours._answer.cache_clear()
