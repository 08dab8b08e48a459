"""Files written straight to storage, and their entries."""

import pytest

from pipeline.storage.checksums import describe
from pipeline.storage.outputs import OutputFiles
from pipeline.store.artifacts import ArtifactStore
from tests.disk import no_large_files


def write(files, name, error=None):
    with files.open(name) as stream:
        stream.write(b"some of it")
        if error:
            raise error


def test_a_file_counts_once_it_is_whole(tmp_path):
    files = OutputFiles(str(tmp_path / "attempt"))
    with files.open("model/a") as stream:
        stream.write(b"first")
        assert not files.written
        stream.write(memoryview(b" second"))
    assert (tmp_path / "attempt/model/a").read_bytes() == b"first second"
    assert files.written == {"model/a": describe(tmp_path / "attempt/model/a")}
    with pytest.raises(KeyError):
        write(files, "model/b", KeyError("second"))
    assert list(files.written) == ["model/a"]


def test_an_error_of_storage_is_not_hidden_by_that_of_closing(tmp_path):
    files = OutputFiles(str(tmp_path))
    with no_large_files(5):
        with pytest.raises(KeyError, match="first"):
            write(files, "full", KeyError("first"))
        with pytest.raises(OSError, match="File too large"):
            write(files, "full")
    assert not files.written
    assert not list(tmp_path.iterdir())


def test_what_workers_wrote_is_in_the_manifest_beside_the_rest(tmp_path):
    attempt = ArtifactStore(str(tmp_path)).begin("stage", "key", {}, {})
    (attempt.folder / "plain").write_text("of the main worker")
    files = OutputFiles(attempt.url)
    with files.open("model/one") as stream:
        stream.write(b"of another")
    attempt.add(files.written)
    artifact = attempt.commit({}, 1.0)
    assert list(artifact.files) == ["model/one", "plain"]
    assert artifact.files["model/one"] == files.written["model/one"]
