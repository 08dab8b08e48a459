"""A node that cannot read the storage says so in a line: it may lack what the driver has."""

import platform

import fsspec
import pytest

from launch.workers.storage import store_on_this_node
from pipeline.errors import StageError
from tests.object_storage import ACCESS, s3_server_away


@pytest.fixture
def forgetful(monkeypatch):
    """Keep no connection of before; and no credentials come from the machine."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    forget = fsspec.get_filesystem_class("s3").clear_instance_cache
    forget()
    yield monkeypatch
    forget()


def test_what_can_be_read_is_returned(forgetful, url):
    assert store_on_this_node(url).url == url


def test_credentials_that_a_node_lacks_are_not_tried_again(forgetful, bucket):
    for name in ACCESS:
        forgetful.delenv(name)
    with pytest.raises(StageError) as failed:
        store_on_this_node(f"{bucket}/runs")
    text = str(failed.value)
    assert text.startswith(f"node {platform.node()}: {bucket}/runs cannot be read: ")
    assert "Unable to locate credentials" in text
    assert text.endswith("every node needs the credentials and libraries that the driver has")


def test_a_server_that_is_away_may_be_back(forgetful, bucket):
    forgetful.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server_away(), pytest.raises(RuntimeError, match="cannot be read") as failed:
        store_on_this_node(f"{bucket}/runs")
    assert not isinstance(failed.value, StageError)  # after which a run is not restarted
