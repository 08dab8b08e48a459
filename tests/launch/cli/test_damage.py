"""Any JSON file of a store dropped, changed, cut, retyped: it is named, and never taken for good."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.cli.main import app
from launch.driver.locking import leased
from launch.driver.run import all_done, last_saved
from pipeline.runs.config import parse_config, read_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, Choices
from pipeline.store import leases, maintenance
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.checkpoints import CheckpointStore
from pipeline.store.leases import LeaseFolder
from pipeline.worker_group import WorkerGroup

_CHECKSUM = "checksum"
# Of the run: what is done, what is being worked on, what was found to be damaged, what failed.
_DONE, _AT_WORK, _CONDEMNED, _FAILED = ("data", "dense"), "prune", "export", "report"


class Store:
    """A store as a run leaves it in the middle of its work, and that run.

    Args:
        folder: where to make it.
        config: path of the run's file.
    """

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder = folder
        values, problems = read_config(str(config), [f"storage={folder}"])
        assert not problems
        self.config = parse_config(values)
        choices = Choices(str(folder), lambda: NO_GPUS)
        self.stages = plan_stages(choices.settle(self.config))
        choices.record()
        store = ArtifactStore(str(folder))
        for stage in self.stages:
            where = store.folder_of(stage.name, stage.key)
            if stage.name in (*_DONE, _CONDEMNED):
                attempt = store.begin(stage.name, stage.key, stage.params, {})
                (attempt.folder / "weights.bin").write_bytes(bytes(100))
                made = attempt.commit({"accuracy": 0.5, "labels": ["a", {"b": None}]}, 1.0)
                if stage.name == _CONDEMNED:
                    store.condemn(made.url, {"weights.bin": "has another checksum"})
            elif stage.name == _AT_WORK:
                kept = CheckpointStore(f"{where}/checkpoints", WorkerGroup.alone())
                for step in (10, 20):
                    kept.save(lambda files, n=step: files.put("w.bin", bytes([n])), step)
                LeaseFolder(where).create(1)
                LeaseFolder(where).renew(1, 3, {"step": 20, "num_steps": 30, "loss": 0.5})
            elif stage.name == _FAILED:
                store.note_failure(stage.name, stage.key, "no space")
        self.files = sorted(path.relative_to(folder) for path in folder.rglob("*.json"))
        self.done = {name: self.found(name) for name in _DONE}

    def found(self, name: str):
        stage = next(stage for stage in self.stages if stage.name == name)
        return ArtifactStore(str(self.folder)).find(stage.name, stage.key)

    def url(self, name: str) -> Path:
        stage = next(stage for stage in self.stages if stage.name == name)
        return Path(ArtifactStore(str(self.folder)).folder_of(stage.name, stage.key))


@pytest.fixture(scope="module")
def store(tiny_bert, words_csv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    values = {
        "name": "damaged",
        "model": {"path": str(tiny_bert)},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 16},
        "data": {"source": "files", "train": str(words_csv)},
        "train": {"length": 20, "batch_size": 8},
        "prune": {"sparsity": 0.5},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    made = Store(folder / "runs", folder / "run.yaml")
    shutil.copytree(made.folder, folder / "whole")
    return made


@pytest.fixture
def short(monkeypatch):
    """A minute is a moment."""
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.02)
    monkeypatch.setattr(maintenance, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr("launch.driver.locking._POLL_SECONDS", 0.01)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.just("0" * 64),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Yield the paths of all that a JSON value holds."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for name, part in value.items() if isinstance(value, dict) else ():
        yield (*path, name)
        yield from places(part, (*path, name))


@st.composite
def damaged(draw, raw):
    """Bytes in place of those of a JSON file."""
    how = draw(st.sampled_from(["drop", "change", "add", "cut", "bytes", "value", "bit"]))
    if how == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    if how == "bytes":
        return draw(st.binary(max_size=40))
    if how == "value":
        return json.dumps(draw(JSON)).encode()
    if how == "bit":
        at, bit = draw(st.integers(0, len(raw) - 1)), draw(st.integers(0, 7))
        return raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :]
    values = copy.deepcopy(json.loads(raw))
    if how == "add":
        values[draw(st.text(min_size=1, max_size=8))] = draw(JSON)
        return json.dumps(values).encode()
    *way, last = draw(st.sampled_from(list(places(values))))
    inside = values
    for name in way:
        inside = inside[name]
    if how == "drop":
        del inside[last]
    else:
        inside[last] = draw(JSON)
    return json.dumps(values).encode()


def says_the_same(before, after):
    """Whether a file says what it said, perhaps without a checksum that vouches for it."""
    try:
        values = json.loads(after)
    except (ValueError, RecursionError):
        return False
    before = json.loads(before)
    if not isinstance(values, dict) or values.get(_CHECKSUM) not in (before[_CHECKSUM], None):
        return False
    before.pop(_CHECKSUM)
    values.pop(_CHECKSUM, None)
    # As text: 1, 1.0 and true are equal in Python.
    return json.dumps(values, sort_keys=True) == json.dumps(before, sort_keys=True)


def mgpp(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def check(store, name, before, after):
    """Look at a store in which one file is damaged with everything that reads it."""
    root, is_good = str(store.folder), says_the_same(before, after)
    listed, checked = mgpp("store", "ls", root), mgpp("store", "verify", root)
    assert listed.exit_code == 0
    for stage in _DONE:
        assert stage in listed.stdout
    assert checked.exit_code == 1  # for what was found to be damaged before
    if not is_good:
        named = name.parent if name.name == "_DAMAGED.json" else name
        assert f"{store.folder / named} is damaged" in listed.stderr
        assert f"{store.folder / named} is damaged" in checked.stderr
    cleared = mgpp("store", "gc", root, "--older-than", "0", "--dry-run")
    assert cleared.exit_code == 0
    for stage in _DONE:
        assert str(store.url(stage)) not in cleared.stdout  # nothing of it is garbage
    assert f"{store.url(_AT_WORK)}/checkpoints/" not in cleared.stdout

    # What `run` asks of a store before and while it works.
    choices = Choices(root, lambda: NO_GPUS)
    stages = plan_stages(choices.settle(store.config))
    assert [stage.key for stage in stages] == [stage.key for stage in store.stages]
    artifacts = ArtifactStore(root)
    assert not all_done(stages, artifacts)
    for stage in _DONE:
        touched = name.parent == store.url(stage).relative_to(store.folder)
        expected = {store.done[stage].metrics["accuracy"]} | ({None} if touched else set())
        found = store.found(stage)
        assert (found and found.metrics["accuracy"]) in expected
        if found and not is_good:
            assert not touched
    assert store.found(_CONDEMNED) is None
    assert last_saved(stages, artifacts)
    assert artifacts.failure(_FAILED, next(s.key for s in stages if s.name == _FAILED))
    kept = CheckpointStore(f"{store.url(_AT_WORK)}/checkpoints", WorkerGroup.alone(), notify=str)
    step, held = kept.restore(lambda saved: (saved.manifest.step, saved.read("w.bin")))
    assert held == bytes([step])
    assert step == 20 or (not is_good and "step-00000020" in str(name))
    # The lease of a process that lives holds; one that is damaged holds until it is not renewed.
    if "_LEASE" in name.name and not is_good:
        at_work = [stage for stage in stages if stage.name == _AT_WORK]
        with leased(at_work, artifacts, progress=lambda _: None, tell=str) as missing:
            assert missing == at_work


def damage_and_check(store, data):
    shutil.rmtree(store.folder)
    shutil.copytree(store.folder.parent / "whole", store.folder)
    name = data.draw(st.sampled_from(store.files), label="file")
    path = store.folder / name
    before = path.read_bytes()
    after = data.draw(damaged(before), label="damage")
    path.write_bytes(after)
    check(store, name, before, after)


def test_the_store_has_a_file_of_each_kind(store):
    assert {path.name for path in store.files} == {
        "_DAMAGED.json",
        "_DONE.json",
        "_FAILED.json",
        "_LEASE.1.json",
        next((store.folder / "auto").iterdir()).name,
    }
    assert sum("checkpoints" in str(path) for path in store.files) == 2


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **SETTINGS)
@given(data=st.data())
def test_what_is_damaged_is_never_taken_for_good(store, short, data):
    damage_and_check(store, data)


@pytest.mark.torture
@pytest.mark.timeout(3600)
@settings(max_examples=3000, **SETTINGS)
@given(data=st.data())
def test_what_is_damaged_is_never_taken_for_good_however_often(store, short, data):
    damage_and_check(store, data)
