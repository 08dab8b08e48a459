"""`mgpp store` and `mgpp show` on stores that are sound, damaged, or not there."""

import json

import pytest
from typer.testing import CliRunner

from launch.cli.main import app
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.leases import LeaseFolder

KEY = "0123456789abcdef"


@pytest.fixture
def store(tmp_path):
    """A store of two artifacts, and of what a run that lives is working on."""
    store = ArtifactStore(str(tmp_path / "runs"))
    for stage in ("data", "dense"):
        attempt = store.begin(stage, KEY, {"lr": 1.0}, {})
        (attempt.folder / "weights.bin").write_bytes(bytes(100))
        attempt.commit({"accuracy": 1.0}, 1.0)
    at_work = store.begin("prune", KEY, {}, {})
    (at_work.folder / "weights.bin").write_bytes(bytes(100))
    LeaseFolder(store.folder_of("prune", KEY)).create(1)
    return store


def mgpp(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def files(store):
    (root,) = ArtifactStore(store.url)._fs.glob(store.url)
    return sorted(ArtifactStore(store.url)._fs.find(root))


@pytest.mark.parametrize("command", ["ls", "gc", "verify"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere", "there is no store at {path}"),
        ("file", "{path} is not a folder"),
        ("file/runs", "there is no store at {path}"),
    ],
)
def test_what_is_no_store_ends_with_one_error(tmp_path, command, name, why):
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    done = mgpp("store", command, str(path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: storage: {why.format(path=path)}, got '{path}'\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("storage", ["", "://", "http://", "memory://", "nowhere://x"])
def test_what_can_be_no_store_ends_with_one_error(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = mgpp("store", "ls", storage)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: storage: ")
    assert done.stderr.count("\n") == 1


def test_what_lives_is_never_deleted(store):
    before = files(store)
    done = mgpp("store", "gc", store.url, "--older-than", "0", "--checkpoints")
    assert (done.exit_code, done.stdout) == (0, "0.0 KiB were freed\n")
    assert files(store) == before


@pytest.mark.parametrize("raw", [b"[]", b"5", b'{"foo": 1}', b"{}", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["_DONE.json", "_FAILED.json"])
def test_a_damaged_file_is_named_by_all_commands(store, name, raw, capfd):
    folder = store.folder_of("dense", KEY)
    with open(f"{folder}/{name}", "wb") as file:
        file.write(raw)
    line = f"{folder}/{name} is damaged: "
    listed = mgpp("store", "ls", store.url)
    assert listed.exit_code == 0
    assert f"warning: {line}" in listed.stderr
    assert all(stage in listed.stdout for stage in ("data", "dense", "prune"))
    capfd.readouterr()
    mgpp("store", "ls", store.url, "--json")
    found = {e["stage"]: e for e in json.loads(capfd.readouterr().out)["entries"]}
    states = {"data": "done", "dense": "done", "prune": "running"}
    if name == "_DONE.json":
        states["dense"] = "damaged"
    assert {stage: entry["state"] for stage, entry in found.items()} == states
    assert list(found["dense"]["damage"]) == [name]
    assert mgpp("store", "gc", store.url, "--dry-run").exit_code == 0
    checked = mgpp("store", "verify", store.url)
    assert checked.exit_code == 1
    assert f"error: {line}" in checked.stderr
    shown = mgpp("show", folder)
    if name == "_DONE.json":
        assert shown.exit_code == 2
        assert line in shown.stderr
    assert mgpp("show", store.folder_of("data", KEY)).exit_code == 0
    discarded = mgpp("store", "verify", store.url, "--discard")
    assert discarded.exit_code == 1
    assert discarded.stderr.endswith("deleted; rerun their runs to make them again\n")
    assert mgpp("store", "verify", store.url).exit_code == 0
    assert (store.find("dense", KEY) is None) == (name == "_DONE.json")


def test_a_damaged_lease_of_a_run_that_lives_is_nothing_to_delete(store, monkeypatch):
    """The run renews it; a minute, here half a second, shows whether one does."""
    monkeypatch.setattr("pipeline.store.leases.STALE_SECONDS", 0.5)
    monkeypatch.setattr("pipeline.store.maintenance._POLL_SECONDS", 0.05)
    folder = LeaseFolder(store.folder_of("prune", KEY))
    path = f"{folder.url}/{folder.name_of(1)}"
    with open(path, "wb") as file:
        file.write(b"{}")
    listed = mgpp("store", "ls", store.url)
    assert f"{path} is damaged: has no checksum" in listed.stderr
    assert "running" in listed.stdout
    folder.renew(1, 1, None)
    assert "damaged" not in mgpp("store", "ls", store.url).stderr
