"""An S3 server on this machine."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest

ACCESS = {
    "AWS_ACCESS_KEY_ID": "an-access-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret-that-no-log-may-show",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve an empty bucket on loopback, known to this process and those it starts; yield its URL."""
    host, port = start_server(0)
    try:
        for name, value in ACCESS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), host]))
        monkeypatch.setenv("NO_PROXY", no_proxy)
        # All servers of a process hold the same buckets.
        name = f"bucket-{uuid.uuid4().hex[:8]}"
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield f"s3://{name}"
    finally:
        _stop(port)
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def s3_server_away() -> Iterator[None]:
    """Stop this process's server while the block runs; what it holds is there when it is back."""
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    _stop(port)
    try:
        yield
    finally:
        start_server(port)


@contextmanager
def sent_objects() -> Iterator[list[tuple[str, int]]]:
    """List what this process's server answers to GetObject while the block runs: file names and bytes."""
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    sent = list[tuple[str, int]]()

    def note(environ: dict[str, Any], num_bytes: int) -> None:
        path = environ["PATH_INFO"].strip("/")
        if environ["REQUEST_METHOD"] == "GET" and "/" in path:
            sent.append((path.rpartition("/")[2], num_bytes))

    with answers_noted(port, note):
        yield sent


@contextmanager
def answers_noted(port: int, note: Callable[[dict[str, Any], int], None]) -> Iterator[None]:
    """Give each request that a server of this process answers, and the bytes of the answer, to `note`."""
    server = _running[port]._server
    real = server.app

    def noting(environ: dict[str, Any], start_response: Any) -> Any:
        parts = list(real(environ, start_response))
        note(environ, sum(map(len, parts)))
        return parts

    server.app = noting
    try:
        yield
    finally:
        server.app = real


_running: dict[int, Any] = {}


def start_server(port: int, address: str = "127.0.0.1") -> tuple[str, int]:
    """Start a server in this process; return where it is, at a port of its own choice for 0."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=address, port=port, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    _running[port] = server
    return host, port


def _stop(port: int) -> None:
    server = _running.pop(port)
    server.stop()
    server._server.server_close()  # or it would still take connections, and answer none
