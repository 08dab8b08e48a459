"""An S3 server on this machine."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

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
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
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
        server.stop()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
