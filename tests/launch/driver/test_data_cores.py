"""The data stage as a task of Ray: it asks for the cores that it uses, and shows its progress."""

import pytest
import ray

from launch.cluster.connect import free_cores
from launch.driver.run import _run_group
from launch.workers.status_actor import make_status_actor
from pipeline.runs.config import parse_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.store.artifacts import ArtifactStore
from tests.processes import ROOT
from tests.tiny import GOOD

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@ray.remote(num_cpus=2)
class Busy:
    def there(self):
        return True


def test_auto_is_what_is_free(cluster):
    assert free_cores() == 3
    busy = [Busy.remote()]
    ray.get(busy[0].there.remote())
    ray_free = [free_cores()]
    busy.append(Busy.options(num_cpus=1).remote())
    ray.get(busy[1].there.remote())
    ray_free.append(free_cores())
    for actor in busy:
        ray.kill(actor)
    assert ray_free == [1, 1]


@pytest.mark.parametrize("num_proc", ["auto", 2])
def test_the_stage_runs_with_the_cores_it_asks_for(cluster, tmp_path, tiny_bert, num_proc):
    rows = [f"{word} day,{i}" for i, word in enumerate(GOOD)] * 20
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    config = settled(
        parse_config(
            {
                "name": "cores",
                "storage": str(tmp_path / "runs"),
                "model": {"path": str(tiny_bert)},
                "task": {"type": "classification", "text": ["text"], "label": "label"},
                "data": {
                    "source": "files",
                    "train": str(tmp_path / "rows.csv"),
                    "num_proc": num_proc,
                },
                "train": {"length": 10},
                "prune": {"sparsity": 0.5},
            }
        ),
        NO_GPUS,
    )
    stage = plan_stages(config)[0]
    store, status = ArtifactStore(str(tmp_path / "runs")), make_status_actor("cores")
    _run_group([stage], config, store, {}, status, here=False)
    assert store.find(stage.name, stage.key).metrics["num_rows"] == {"train": 144, "validation": 16}
    record = ray.get(status.latest.remote())[0]["data"]
    assert record["event"] == "rows"
    assert record["done"] == record["total"]
