"""The data stage as a task of Ray: it asks for the cores that it uses, and shows its progress."""

import platform
import time

import pytest
import ray

from launch.cluster.connect import connected, free_cores
from launch.driver.run import _Run, _run_group
from launch.workers.status_actor import make_status_actor
from pipeline.errors import StageError
from pipeline.runs.config import ClusterConfig, parse_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.store.artifacts import ArtifactStore
from tests.object_storage import s3_server
from tests.tiny import GOOD

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cores():
    """The cores of a cluster on this machine; at least two are needed to tell anything."""
    with connected(ClusterConfig()):
        yield int(ray.cluster_resources()["CPU"])


def a_run(config, store, status):
    """A run whose stages without a worker group are tasks of the cluster."""
    return _Run(config=config, store=store, status=status)


@ray.remote(num_cpus=1)
class Busy:
    def there(self):
        return True


def comes_true(condition):
    """Wait for something that another process says when it gets to it."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_auto_is_what_is_free(cores):
    assert comes_true(lambda: free_cores() == cores)
    busy = [Busy.remote() for _ in range(cores)]
    ray.get([each.there.remote() for each in busy])
    assert comes_true(lambda: ray.available_resources().get("CPU", 0) == 0)
    assert free_cores() == 1  # which has to be waited for
    ray.kill(busy[0])
    assert comes_true(lambda: ray.available_resources().get("CPU", 0) == 1)
    assert free_cores() == 1
    for each in busy[1:]:
        ray.kill(each)
    assert comes_true(lambda: free_cores() == cores)


def make_config(storage, model, rows, num_proc):
    return settled(
        parse_config(
            {
                "name": "cores",
                "storage": storage,
                "model": {"path": str(model)},
                "task": {"type": "classification", "text": ["text"], "label": "label"},
                "data": {"source": "files", "train": str(rows), "num_proc": num_proc},
                "train": {"length": 10},
                "prune": {"sparsity": 0.5},
            }
        ),
        NO_GPUS,
    )


@pytest.mark.parametrize("num_proc", ["auto", 1])
def test_the_stage_runs_with_the_cores_it_asks_for(cores, tmp_path, tiny_bert, num_proc):
    rows = [f"{word} day,{i}" for i, word in enumerate(GOOD)] * 20
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    config = make_config(str(tmp_path / "runs"), tiny_bert, tmp_path / "rows.csv", num_proc)
    stage = plan_stages(config)[0]
    store, status = ArtifactStore(str(tmp_path / "runs")), make_status_actor("cores")
    _run_group(a_run(config, store, status), [stage])
    assert store.find(stage.name, stage.key).metrics["num_rows"] == {"train": 144, "validation": 16}

    def all_rows_told():
        record = ray.get(status.latest.remote())[0].get("data") or {}
        return record.get("event") == "rows" and record["done"] == record["total"]

    assert comes_true(all_rows_told)  # the task's worker posts; nothing waits for its last post


def test_a_node_without_the_driver_s_credentials_is_named(cores, tmp_path, tiny_bert, monkeypatch):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "\n".join(f"{word} day,0" for word in GOOD))
    with s3_server(monkeypatch) as bucket:  # known to this process: the cluster was there before
        config = make_config(f"{bucket}/runs", tiny_bert, rows, 1)
        stage = plan_stages(config)[0]
        store, status = ArtifactStore(f"{bucket}/runs"), make_status_actor("cores")
        with pytest.raises(StageError) as failed:
            _run_group(a_run(config, store, status), [stage])
    (line,) = str(failed.value).splitlines()
    assert line.startswith(f"node {platform.node()}: {bucket}/runs cannot be read: ")
    assert line.endswith("every node needs the credentials and libraries that the driver has")
