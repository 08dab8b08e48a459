"""The artifact store, on a local folder and on storage that is none."""

import hashlib
import json
import os
import stat
import uuid

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.storage.filesystems import put_json
from pipeline.store.artifacts import ArtifactStore, make_key, open_artifact

FILES = {
    "model/weights.bin": bytes(range(256)) * 10,
    "model/config.json": b'{"a": 1}',
    "empty": b"",
    "deep/er/still/note.txt": "é\n".encode(),
}
PARAMS = {"lr": 1e-4, "name": "x"}
METRICS = {"accuracy": 0.5, "num_rows": {"train": 3}}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path, monkeypatch):
    """A store on a local folder, or on one that files must be fetched from."""
    monkeypatch.setenv("MGPP_CACHE", str(tmp_path / "machine"))
    if request.param == "local":
        yield ArtifactStore(str(tmp_path / "storage"))
        return
    url = f"memory://{uuid.uuid4().hex}/storage"
    yield ArtifactStore(url)
    filesystem, root = fsspec.core.url_to_fs(url)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


def begin(store, files=FILES, key="0123abcd", inputs=None):
    attempt = store.begin("train", key, PARAMS, inputs or {})
    for name, content in files.items():
        path = attempt.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return attempt


def stored(store):
    """All files under the storage root, relative to it."""
    filesystem, root = fsspec.core.url_to_fs(store.url)
    if not filesystem.exists(root):
        return []
    return sorted(str(path).split("/storage/", 1)[1] for path in filesystem.find(root))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Keys.


def test_a_key_is_stable():
    # Computed by hand from the text that is hashed: a change of it would orphan all artifacts.
    text = '{"inputs":{"data":"k"},"params":{"a":1},"stage":"train","version":1}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert make_key("train", 1, {"a": 1}, {"data": "k"}) == expected


def test_every_part_changes_the_key():
    keys = [
        make_key("train", 1, {"a": 1}, {"data": "k"}),
        make_key("dense", 1, {"a": 1}, {"data": "k"}),
        make_key("train", 2, {"a": 1}, {"data": "k"}),
        make_key("train", 1, {"a": 2}, {"data": "k"}),
        make_key("train", 1, {"b": 1}, {"data": "k"}),
        make_key("train", 1, {"a": "1"}, {"data": "k"}),
        make_key("train", 1, {"a": 1, "b": None}, {"data": "k"}),
        make_key("train", 1, {"a": [1]}, {"data": "k"}),
        make_key("train", 1, {"a": 1}, {"data": "l"}),
        make_key("train", 1, {"a": 1}, {"model": "k"}),
        make_key("train", 1, {"a": 1}, {}),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


@settings(max_examples=30)
@given(params=st.dictionaries(st.text(max_size=3), values, min_size=1, max_size=4))
def test_the_order_of_keys_changes_nothing(params):
    def turned(value):
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(value)}
        return [turned(inner) for inner in value] if isinstance(value, list) else value

    inputs = {"data": "k", "model": "l"}
    assert make_key("s", 1, params, inputs) == make_key("s", 1, turned(params), turned(inputs))


# Attempts and artifacts.


def test_a_committed_attempt_is_found_and_holds_what_was_written(store):
    other = begin(store, key="ffff").commit({}, 0.0)
    attempt = begin(store, inputs={"data": other})
    committed = attempt.commit(METRICS, seconds=1.23456)
    found = store.find("train", "0123abcd")
    assert found == committed
    assert (found.stage, found.key, found.seconds) == ("train", "0123abcd", 1.235)
    assert (found.params, found.metrics) == (PARAMS, METRICS)
    assert found.inputs == {"data": "ffff"}
    assert found.url == attempt.url
    assert contents(found.path) == FILES


def test_the_manifest_describes_each_file(store):
    committed = begin(store).commit({}, 0.0)
    assert committed.files == {
        name: {
            "bytes": len(content),
            "blocks": [hashlib.sha256(content).hexdigest()] if content else [],
        }
        for name, content in FILES.items()
    }


def test_the_manifest_is_json_beside_the_attempt(store):
    attempt = begin(store)
    attempt.commit(METRICS, 2.0)
    folder = attempt.url.rsplit("/", 1)[0]
    assert folder == store.folder_of("train", "0123abcd")
    with fsspec.open(f"{folder}/_DONE.json") as file:
        manifest = json.load(file)
    assert manifest["url"] == attempt.url.rsplit("/", 1)[1]
    assert manifest["metrics"] == METRICS


def test_an_attempt_without_a_commit_is_not_found(store):
    attempt = begin(store)
    assert store.find("train", "0123abcd") is None
    second = begin(store, {"a": b"1"})
    assert second.url != attempt.url
    second.commit({}, 0.0)
    assert contents(store.find("train", "0123abcd").path) == {"a": b"1"}


def test_an_attempt_that_writes_no_files_is_an_artifact(store):
    committed = begin(store, {}).commit(METRICS, 0.0)
    assert store.find("train", "0123abcd") == committed
    assert committed.files == {}
    assert committed.metrics == METRICS


def test_nothing_but_files_and_the_manifest_is_stored(store):
    attempt = begin(store)
    attempt.commit({}, 0.0)
    name = attempt.url.rsplit("/", 1)[1]
    expected = [f"train-0123abcd/{name}/{file}" for file in FILES] + ["train-0123abcd/_DONE.json"]
    assert stored(store) == sorted(expected)


def test_what_is_missing_is_none(store):
    assert store.find("train", "0123abcd") is None
    assert store.read(f"{store.url}/nowhere/_DONE.json") is None


def changed(artifact, name, how):
    """Change a file of an artifact, or its manifest, in storage."""
    filesystem, root = fsspec.core.url_to_fs(artifact.url)
    path = f"{root.rpartition('/')[0]}/_DONE.json" if name == "_DONE.json" else f"{root}/{name}"
    after = how(filesystem.cat_file(path))
    filesystem.rm(path)
    if after is not None:
        filesystem.pipe_file(path, after)


@pytest.mark.parametrize(
    ("name", "how", "why"),
    [
        ("model/weights.bin", lambda data: None, "model/weights.bin is missing"),
        ("model/weights.bin", lambda data: data[1:], "model/weights.bin has 2559 bytes, not 2560"),
        ("_DONE.json", lambda data: data[:-9], "_DONE.json: no JSON (JSONDecodeError)"),
        (
            "_DONE.json",
            lambda data: data.replace(b"0.5", b"0.9"),
            "_DONE.json: it was changed after it was written (another checksum)",
        ),
        ("_DONE.json", lambda data: None, ""),
    ],
)
def test_what_is_not_all_there_is_not_finished(store, name, how, why):
    committed = begin(store).commit(METRICS, 0.0)
    assert store.damage("train", "0123abcd") == ""
    changed(committed, name, how)
    assert store.find("train", "0123abcd") is None
    assert store.damage("train", "0123abcd") == why
    again = begin(store).commit(METRICS, 0.0)
    assert store.find("train", "0123abcd") == again
    assert store.damage("train", "0123abcd") == ""


def test_another_key_s_manifest_is_not_this_one_s(store):
    filesystem, path = fsspec.core.url_to_fs(begin(store).commit(METRICS, 0.0).url)
    there = store.folder_of("train", "ffff")
    filesystem.makedirs(fsspec.core.url_to_fs(there)[1], exist_ok=True)
    moved = fsspec.core.url_to_fs(f"{there}/_DONE.json")[1]
    filesystem.copy(f"{path.rpartition('/')[0]}/_DONE.json", moved)
    assert store.find("train", "ffff") is None
    assert store.damage("train", "ffff") == "_DONE.json is of train-0123abcd"


def test_what_was_found_to_be_wrong_stays_so_until_it_is_made_again(store):
    committed = begin(store).commit(METRICS, 0.0)
    store.condemn(committed.url, {"model/config.json": "has another checksum"})
    assert store.find("train", "0123abcd") is None
    assert store.damage("train", "0123abcd") == "model/config.json has another checksum"
    again = begin(store).commit(METRICS, 0.0)
    assert store.find("train", "0123abcd") == again
    store.condemn(committed.url, {"model/config.json": "has another checksum"})  # by another run
    assert store.find("train", "0123abcd") == again


def test_one_file_is_read_without_the_others(store, monkeypatch):
    committed = begin(store).commit({}, 0.0)
    monkeypatch.setattr(type(committed), "path", None)
    name = "deep/er/still/note.txt"
    assert committed.read_text(name) == FILES[name].decode()


def test_an_artifact_outlives_its_store_object(store):
    committed = begin(store).commit({}, 0.0)
    assert ArtifactStore(store.url).find("train", "0123abcd") == committed


# Opening by path.


def test_an_artifact_opens_by_its_folders_and_its_manifest(store):
    committed = begin(store).commit(METRICS, 0.0)
    folder = store.folder_of("train", "0123abcd")
    for path in (folder, folder + "/", committed.url, committed.url + "/", folder + "/_DONE.json"):
        assert open_artifact(path) == committed, path


def test_a_path_without_an_artifact_is_refused(store):
    attempt = begin(store)
    for path in (store.folder_of("train", "0123abcd"), attempt.url, f"{store.url}/nowhere/x"):
        with pytest.raises(FileNotFoundError, match="no finished artifact here"):
            open_artifact(path)


def test_an_abandoned_attempt_does_not_open_as_another(store):
    abandoned = begin(store)
    begin(store, {"a": b"1"}).commit({}, 0.0)
    with pytest.raises(FileNotFoundError, match="no finished artifact here"):
        open_artifact(abandoned.url)


def test_a_relative_path_opens(tmp_path, monkeypatch):
    store = ArtifactStore(str(tmp_path / "storage"))
    committed = begin(store).commit({}, 0.0)
    monkeypatch.chdir(tmp_path)
    assert open_artifact("storage/train-0123abcd") == committed
    assert open_artifact(f"storage/train-0123abcd/{committed.path.name}") == committed
    monkeypatch.chdir(committed.path.parent)
    assert open_artifact(".") == committed


@pytest.mark.parametrize("path", ["{attempt}", "_DONE.json"])
def test_a_path_of_one_part_opens(tmp_path, monkeypatch, path):
    committed = begin(ArtifactStore(str(tmp_path / "storage"))).commit({}, 0.0)
    monkeypatch.chdir(committed.path.parent)
    assert open_artifact(path.format(attempt=committed.path.name)) == committed


def test_the_attempts_folder_opens_from_inside(tmp_path, monkeypatch):
    committed = begin(ArtifactStore(str(tmp_path / "storage"))).commit({}, 0.0)
    monkeypatch.chdir(committed.path)
    assert open_artifact(".") == committed


# Files.


def test_a_discarded_folder_is_gone_and_may_be_discarded_again(store):
    committed = begin(store).commit({}, 0.0)
    store.discard(committed.url)
    assert stored(store) == ["train-0123abcd/_DONE.json"]
    store.discard(committed.url)
    store.discard(store.folder_of("train", "0123abcd"))
    assert store.find("train", "0123abcd") is None


def test_put_json_replaces_and_leaves_no_temporary_file(store):
    folder = store.folder_of("train", "0123abcd")
    begin(store)  # makes the folder
    before = stored(store)
    filesystem, path = fsspec.core.url_to_fs(f"{folder}/state.json")
    put_json(filesystem, path, {"step": 1})
    put_json(filesystem, path, {"step": 2, "é": [None]})
    assert stored(store) == sorted([*before, "train-0123abcd/state.json"])
    with fsspec.open(f"{folder}/state.json") as file:
        assert json.load(file) == {"step": 2, "é": [None]}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_rights_that_the_umask_leaves_whoever_wrote_them(tmp_path, umask):
    before = os.umask(umask)
    try:
        attempt = begin(ArtifactStore(str(tmp_path / "storage")))
        save_file({"weight": torch.zeros(3)}, attempt.folder / "model" / "model.safetensors")
        modes = {stat.S_IMODE(p.stat().st_mode) for p in attempt.folder.rglob("*.safetensors")}
        assert modes == {0o600}  # what safetensors leaves, whatever the umask
        artifact = attempt.commit(METRICS, 1.0)
    finally:
        os.umask(before)
    for path in (tmp_path / "storage").rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert (artifact.path / "model" / "model.safetensors").is_file()
