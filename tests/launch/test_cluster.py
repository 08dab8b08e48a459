"""What a run knows of its cluster: interfaces, nodes, metrics."""

import json
import re
import socket

import psutil
import pytest

from launch.board import GAUGES, PREFIX, RESTARTS
from launch.cluster import wait_for_nodes
from launch.network import _VARIABLES, interface_of, use_node_interface
from pipeline.errors import ConfigError
from pipeline.train_config import TrainConfig
from tests.launch.conftest import mgpp


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
