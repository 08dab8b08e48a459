"""`mgpp store` and `mgpp show` on stores that are sound, damaged, or not there."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.main import app
from launch.driver.campaign import plan_campaign
from pipeline.campaigns.grid import read_campaign
from pipeline.runs.hardware import NO_GPUS, Choices
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


@pytest.fixture
def recipe(tiny_bert, words_csv, tmp_path):
    values = {
        "name": "tried",
        "storage": str(tmp_path / "runs"),
        "model": {"path": str(tiny_bert)},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 16},
        "data": {"source": "files", "train": str(words_csv)},
        "train": {"length": 20, "batch_size": 8},
        "prune": {"sparsity": 0.5},
        "cluster": {"num_workers": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize(
    ("storage", "why"),
    [
        ("/proc/x", "/proc/x cannot be written: /proc: No such file or directory"),
        ("''", "is empty, got ''"),
        ("'://'", "no such kind of storage, got '://'"),
        ("'http://'", "http:// can only be read, got 'http://'"),
        ("'memory://'", "memory:// is gone with the process that writes it"),
        ("run.yaml/runs", "is not a folder"),
    ],
)
@pytest.mark.usefixtures("datasets_cache")
def test_storage_that_cannot_be_is_refused(recipe, monkeypatch, command, storage, why):
    monkeypatch.chdir(recipe.parent)
    before = sorted(Path().iterdir())
    done = mgpp(command, "run.yaml", f"storage={storage}")
    assert done.exit_code == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: storage: ")
    assert why in line
    assert sorted(Path().iterdir()) == before


def shown(grid):
    """How many runs of a campaign are in which state."""
    done = mgpp("campaign", "status", str(grid))
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()[-1]


@pytest.mark.usefixtures("datasets_cache")
def test_the_status_of_a_campaign_is_shown_whatever_is_damaged(recipe):
    grid = recipe.parent / "grid.yaml"
    values = {
        "name": "grid",
        "recipe": "run.yaml",
        "storage": str(recipe.parent / "runs"),
        "sparsities": [0.5, 0.6],
        "seeds": [0],
        "methods": {"GMP": {"changes": {"prune": {"method": {"name": "gmp"}}}}},
    }
    grid.write_text(yaml.safe_dump(values))
    store = ArtifactStore(values["storage"])
    choices = Choices(store.url, lambda: NO_GPUS)
    planned = list(plan_campaign(read_campaign(str(grid), []), choices).final.values())
    choices.record()
    stages = {stage.key: stage for run in planned for stage in run.stages}
    failed = stages.pop(planned[-1].stages[-1].key)
    store.note_failure(failed.name, failed.key, "no space")
    for stage in stages.values():
        metrics = {"pruned": {"accuracy": 0.5}, "dense": {"accuracy": 0.5}}
        store.begin(stage.name, stage.key, {}, {}).commit(metrics, 1.0)
    whole = shown(grid)
    assert whole == f"{len(planned) - 1} done, 1 failed"
    of_done = {f"{s.name}-{s.key}" for run in planned[:-1] for s in run.stages}
    paths = list(Path(store.url).glob("*/*.json"))
    assert {path.parent.name.partition("-")[0] for path in paths} >= {"auto", "data", "prune"}
    for path in paths:
        before = path.read_bytes()
        for raw in (b"[]", b"{}", b"\xff"):
            path.write_bytes(raw)
            found = shown(grid)
            undone = path.name == "_DONE.json" and path.parent.name in of_done
            assert (found == whole) == (not undone), path
        path.write_bytes(before)
    assert shown(grid) == whole
