"""Two runs at once on one store: all is made once, and as one run by itself makes it; nothing is left."""

import json
import multiprocessing
import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch.driver import locking
from launch.driver.locking import made_once
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import ArtifactStore, make_key
from pipeline.store.maintenance import entries
from tests.launch.runs import Driver
from tests.processes import MGPP

# What the second run changes, and so what the two have in common.
WAYS = {
    "the same": [],
    "shared data": ["dense.length=6"],
    "shared dense": ["prune.sparsity=0.7"],
}


def stages(changed):
    """Stages in a row, of which the last ones are another run's own."""
    planned, inputs = [], {}
    for i, name in enumerate(("data", "dense", "prune")):
        own = i >= 3 - changed
        key = make_key(name, 1, {"own": own}, inputs)
        inputs = {name: key}
        planned.append(PlannedStage(name=name, key=key, params={}, inputs=(), on_all_workers=False))
    return planned


def run(url, planned, barrier, made):
    locking._POLL_SECONDS = 0.01
    store = ArtifactStore(url)

    def make(stage, folder):
        made.put(stage.key)
        time.sleep(0.05)  # so that the other one comes upon it
        (folder / "weights").write_text(stage.key)
        return {"key": stage.key}

    barrier.wait(60)
    for stage in planned:
        made_once(stage, store, lambda folder, s=stage: make(s, folder), tell=str)


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_make_each_stage_once(tmp_path, changed, num_processes):
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(num_processes), context.Queue()
    runs = [stages(changed if i % 2 else 0) for i in range(num_processes)]
    processes = [
        context.Process(target=run, args=(str(tmp_path), planned, barrier, made))
        for planned in runs
    ]
    try:
        for process in processes:
            process.start()
        keys = {stage.key for planned in runs for stage in planned}
        assert sorted(made.get(timeout=60) for _ in keys) == sorted(keys)
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join(timeout=10)
    assert made.empty()
    found = list(entries(ArtifactStore(str(tmp_path))))
    assert {entry.artifact.metrics["key"] for entry in found} == keys
    assert len(list(tmp_path.rglob("*"))) == 4 * len(keys)  # folder, manifest, attempt, file


def contents(storage: Path):
    """What runs made: the files of models and the figures, by stage and key; nothing else is there."""
    found = {}
    for entry in entries(ArtifactStore(str(storage))):
        assert entry.state == "done", entry
        name = f"{entry.stage}-{entry.key}"
        attempt = entry.artifact.path.name
        assert sorted(p.name for p in (storage / name).iterdir()) == ["_DONE.json", attempt], name
        files = {n: e for n, e in entry.artifact.files.items() if n.startswith("model/")}
        files.pop("model/README.md", None)  # has the seconds that it took
        metrics = entry.artifact.metrics if entry.stage == "evaluate" else None
        found[name] = (files, metrics)
    return found


def at_once(project, storage, *overrides, delay=0.0):
    """Run the project with each list of changes, all at once; return how each ended."""
    with ExitStack() as stack:
        drivers = []
        for i, changes in enumerate(overrides):
            command = [MGPP, "run", str(project / "run.yaml"), f"storage={storage}", *changes]
            (storage.parent / str(i)).mkdir(parents=True, exist_ok=True)
            beside = storage.parent / str(i) / "runs"
            drivers.append(stack.enter_context(Driver([*command, "--json"], beside)))
            time.sleep(delay)
        return [driver.end() for driver in drivers]


@pytest.fixture(scope="module")
def alone(project, tmp_path_factory):
    """What each run makes by itself."""
    found = {}
    for way, changes in WAYS.items():
        storage = tmp_path_factory.mktemp("alone") / "runs"
        ((code, log),) = at_once(project, storage, changes)
        assert code == 0, log[-6000:]
        found[way] = contents(storage)
    return found


@pytest.mark.torture
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("way", WAYS)
def test_two_runs_at_once_make_what_each_makes_alone(project, alone, tmp_path, way, number):
    chance = random.Random(number)
    storage = tmp_path / "runs"
    ended = at_once(project, storage, [], WAYS[way], delay=chance.choice([0, chance.uniform(0, 8)]))
    for code, log in ended:
        assert code == 0, log[-6000:]
        assert json.loads(log.strip().splitlines()[-1])["status"] == "done"
    assert contents(storage) == {**alone["the same"], **alone[way]}
