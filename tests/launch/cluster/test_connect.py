"""What a run knows of its cluster: interfaces, nodes, metrics."""

import json
import re
import socket
import time
import urllib.request

import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.train import ControllerError, WorkerGroupError

from launch.cluster import connect
from launch.cluster.connect import cluster_capacity, local_capacity, wait_for_nodes
from launch.workers.network import _VARIABLES, interface_of, use_node_interface
from launch.workers.status_actor import GAUGES, PREFIX, RESTARTS
from launch.workers.worker_group import _reason
from pipeline.errors import ConfigError
from pipeline.runs.config import ClusterConfig
from pipeline.training.config import TrainConfig
from tests.launch.conftest import mgpp
from tests.launch.runs import run_on


@pytest.mark.parametrize(
    ("file", "limit", "expected"),
    [
        ("memory.max", "1000\n", 1000),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "2000\n", 2000),
        ("memory/memory.limit_in_bytes", f"{2**63 - 4096}\n", None),
    ],
)
def test_memory_of_this_machine_is_what_its_control_group_allows(
    tmp_path, monkeypatch, file, limit, expected
):
    monkeypatch.setattr(connect, "_CGROUP", tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(limit)
    assert local_capacity().memory == (expected or psutil.virtual_memory().total,)


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None  # an address for documentation: nobody's
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert interface_of(entry.address) == name


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    for variable in _VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    use_node_interface()
    import os

    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    for variable in _VARIABLES:  # set by the code, not by monkeypatch
        monkeypatch.delenv(variable)


def test_waiting_needs_an_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        wait_for_nodes(1, 1.0)


@pytest.mark.distributed
def test_the_dashboard_asks_for_metrics_that_there_are(project):
    done = mgpp(project, "cluster", "dashboard")
    dashboard = json.loads(done.stdout)
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(ray_\w+)\{", target["expr"])
    }
    assert asked == {PREFIX + name for name in GAUGES} | {f"{PREFIX}{RESTARTS}_total"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize(
    ("micro", "fitting"), [(None, [1, 2, 3, 4, 6, 8, 12, 24]), (4, [1, 2, 3, 6]), (5, [])]
)
def test_numbers_of_workers_that_a_batch_divides_among(micro, fitting):
    train = TrainConfig(length=10, batch_size=24, micro_batch_size=micro)
    assert [n for n in range(1, 30) if train.goes_with(n)] == fitting


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            WorkerGroupError("all of it", {1: RuntimeError("first\nout of memory")}),
            "workers failed more often than cluster.max_failures (3) allows; rank 1: out of memory. Fix",
        ),
        (
            ControllerError(OSError("no disk")),
            "Ray Train could not run the workers; rerun",
        ),
    ],
)
def test_why_workers_failed_is_said_first_and_in_full_after(error, expected):
    first, _, rest = _reason(error, ClusterConfig(num_workers=2), 2).partition("\n")
    assert first.startswith(expected)
    assert rest == str(error)


# A cluster of several nodes on this machine.


@pytest.mark.distributed
def test_workers_that_cannot_fit_are_refused_at_once(project, tmp_path, cluster):
    cluster.add_node(num_cpus=1)
    memory = _capacity(cluster).memory
    assert len(memory) == 2
    assert all(0 < size <= psutil.virtual_memory().total for size in memory)
    since = time.monotonic()
    with run_on(project, tmp_path / "runs", cluster) as run:
        code, log = run.end(timeout=120)
    assert code == 2, log
    assert "the cluster can hold 1 (nodes: 1 of 1 CPUs and 0 GPUs, 1 of 0 CPUs and 0 GPUs)" in log
    assert time.monotonic() - since < 90
    assert not (tmp_path / "runs").exists()


@pytest.mark.distributed
def test_prometheus_finds_a_run_at_its_nodes_port(project, tmp_path, cluster):
    cluster.add_node(num_cpus=2)
    with run_on(project, tmp_path / "runs", cluster) as run:
        run.wait_for(20)
        ports = _metrics_ports(cluster)
        deadline = time.monotonic() + 120
        while not (found := _scraped(ports)).keys() >= set(GAUGES) - {"mgpp_threshold"}:
            assert time.monotonic() < deadline, found
            time.sleep(1)
    for labels, _ in found.values():
        assert (labels["run"], labels["stage"]) == ("tiny", "prune")
    assert found["mgpp_num_steps"][1] == 160
    assert 0 < found["mgpp_step"][1] <= 160
    assert 0 <= found["mgpp_mask_sparsity"][1] <= 0.8
    assert found["mgpp_tokens_per_second"][1] > 0


def _capacity(cluster):
    ray.init(address=cluster.address, logging_level="error")
    try:
        return cluster_capacity()
    finally:
        ray.shutdown()


def _metrics_ports(cluster):
    ray.init(address=cluster.address, logging_level="error")
    try:
        return [(n["NodeManagerAddress"], n["MetricsExportPort"]) for n in ray.nodes()]
    finally:
        ray.shutdown()


def _scraped(ports):
    """Labels and value of each of our gauges, by name, as read by Prometheus's own parser."""
    found = {}
    for host, port in ports:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            name = family.name.removeprefix(PREFIX)
            if name in GAUGES:
                (sample,) = family.samples
                found[name] = (sample.labels, sample.value)
    return found
