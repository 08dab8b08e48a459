"""Paths into installed packages, and the checksum of a file or a folder."""

import hashlib

import pytest

from pipeline.store.locations import content_sha256, resolve_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a file and a folder, on the import path."""
    folder = tmp_path / "site" / "a_package_of_a_test"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "inner" / "file.txt").write_text("x")
    (tmp_path / "site" / "a_module_of_a_test.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


@pytest.mark.parametrize("path", ["runs", "/abs/olute", "org/model", "a:b", "s3://bucket/x", ""])
def test_other_paths_are_left_alone(path):
    assert resolve_path(path) == path


def test_a_path_into_a_package(package):
    inner = "package:a_package_of_a_test/inner"
    assert resolve_path(inner) == str(package / "inner")
    assert resolve_path(f"{inner}/file.txt") == str(package / "inner" / "file.txt")


@pytest.mark.parametrize("path", ["package:a_package_of_a_test", "package:a_package_of_a_test/"])
def test_a_package_itself(package, path):
    assert resolve_path(path) == str(package)


def test_a_package_inside_a_package(package):
    (package / "inner" / "__init__.py").touch()
    path = "package:a_package_of_a_test.inner/file.txt"
    assert resolve_path(path) == str(package / "inner" / "file.txt")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    "name", ["no_such_package", "no_such_package.inner", "a_module_of_a_test", "", "."]
)
def test_a_package_that_is_not_installed(name):
    path = f"package:{name}/inner"
    with pytest.raises(ValueError, match="is not installed") as raised:
        resolve_path(path)
    assert str(raised.value).startswith(f"{path}: package {name!r}")


@pytest.mark.usefixtures("package")
def test_a_file_that_is_not_in_the_package():
    path = "package:a_package_of_a_test/inner/other.txt"
    with pytest.raises(ValueError, match=r"has no 'inner/other\.txt'") as raised:
        resolve_path(path)
    assert str(raised.value).startswith(path)


def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"some bytes")
    assert content_sha256(tmp_path / "file") == hashlib.sha256(b"some bytes").hexdigest()


def test_the_checksum_of_a_folder_is_of_names_and_contents(tmp_path):
    def make(name, files):
        folder = tmp_path / name
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return content_sha256(folder)

    files = {"b": b"1", "a/x": b"2", "a/y": b""}
    original = make("one", files)
    assert make("two", dict(reversed(files.items()))) == original
    lines = [f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n" for name in ("a/x", "a/y", "b")]
    assert original == hashlib.sha256("".join(lines).encode()).hexdigest()
    others = [
        make("changed", {**files, "b": b"3"}),
        make("renamed", {"c": b"1", "a/x": b"2", "a/y": b""}),
        make("moved", {"b": b"1", "x": b"2", "a/y": b""}),
        make("more", {**files, "c": b""}),
        make("less", {"b": b"1", "a/x": b"2"}),
    ]
    assert len({original, *others}) == 6


def test_what_is_missing_has_no_checksum(tmp_path):
    with pytest.raises(FileNotFoundError):
        content_sha256(tmp_path / "missing")
