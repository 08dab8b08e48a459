"""Storage as users have it, for all tests."""

import pytest

from tests.object_storage import s3_server


@pytest.fixture(scope="module")
def bucket():
    """The URL of an empty bucket."""
    with pytest.MonkeyPatch.context() as monkeypatch, s3_server(monkeypatch) as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path):
    """The URL of a place where nothing is yet: a folder, or in a bucket."""
    if request.param == "local":
        return str(tmp_path / "storage")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
