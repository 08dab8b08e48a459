"""`cluster.timeout_seconds` reaches all process groups of a worker; test_gradients reads the groups."""

from datetime import timedelta

import pytest
import ray
import ray.train.torch
import torch
import torch.distributed as dist

import pipeline.training.deepspeed
from launch.workers.worker import work
from pipeline.runs.config import parse_config
from pipeline.worker_group import WorkerGroup


class DoneError(Exception):
    pass


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_groups_made_by_others_have_the_cluster_s_timeout(
    tiny_bert, words_csv, monkeypatch, backend
):
    config = parse_config(
        {
            "name": "timeout",
            "model": {"path": str(tiny_bert)},
            "task": {"type": "classification", "text": ["text"], "label": "label"},
            "data": {"source": "files", "train": str(words_csv)},
            "prune": {"sparsity": 0.5},
            "zero": {"precision": "fp32"},
            "cluster": {"timeout_seconds": 123, "gpus_per_worker": 0},
        }
    )
    stage = {"name": "prune", "key": "k", "params": {}, "inputs": (), "on_all_workers": True}
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # put back afterwards
        monkeypatch.setattr(dist.distributed_c10d, name, timedelta(seconds=1))
    status = type(
        "Status", (), {"failure": type("Call", (), {"remote": staticmethod(lambda: None)})}
    )
    monkeypatch.setattr("launch.workers.worker.use_devices", lambda gpus: None)  # this is no worker
    monkeypatch.setattr(ray, "get", lambda found: found)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(WorkerGroup, "current", WorkerGroup.alone)

    def load_operators(*_):
        raise DoneError  # before any group is made

    monkeypatch.setattr(pipeline.training.deepspeed, "load_operators", load_operators)
    with pytest.raises(DoneError):
        work(
            {
                "status": status,
                "config": config.model_dump(mode="json"),
                "storage": "runs",
                "inputs": {},
                "stages": [stage],
            }
        )
    assert dist.distributed_c10d._get_default_timeout(backend) == timedelta(seconds=123)
