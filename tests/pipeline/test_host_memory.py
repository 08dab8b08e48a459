"""The memory that is left: of the machine, or of control groups; for all workers of a node together."""

import psutil
import pytest

from pipeline import host_memory
from pipeline.host_memory import Room, room_on_nodes
from pipeline.worker_group import WorkerGroup

GIB = 1 << 30


def write_group(folder, limit, used, reclaimable):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\n")


def test_limits_of_all_control_groups_around_a_process_count(tmp_path):
    (tmp_path / "cgroup.procs").write_text("")  # the root group has no limit
    write_group(tmp_path / "job", 10 * GIB, 4 * GIB, GIB)
    write_group(tmp_path / "job" / "step", "max", GIB, 0)
    assert host_memory._left_of_cgroups(tmp_path, "/job/step") == [7 * GIB]
    write_group(tmp_path / "job" / "step", 2 * GIB, 3 * GIB, 0)
    assert host_memory._left_of_cgroups(tmp_path, "/job/step") == [0, 7 * GIB]
    assert host_memory._left_of_cgroups(tmp_path, "/") == []


def test_this_machine_has_some_left():
    assert 0 < host_memory.available_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("found", "fits", "node"),
    [
        ([("a", 3, 10), ("b", 3, 10)], True, "a"),
        ([("a", 4, 10), ("a", 4, 9)], False, "a"),
        ([("a", 4, 100), ("a", 4, 100), ("b", 9, 10)], False, "b"),
        ([("a", 0, 0)], True, "a"),
    ],
)
def test_workers_of_a_node_share_what_it_has(found, fits, node):
    room = host_memory._tightest([(n, w * GIB, a * GIB) for n, w, a in found])
    assert (room.fits, room.node) == (fits, node)


def test_what_a_process_alone_wants_is_held_against_what_is_free():
    assert room_on_nodes(1000, WorkerGroup.alone()).fits
    assert not room_on_nodes(psutil.virtual_memory().total, WorkerGroup.alone()).fits
    room = Room(fits=False, node="n1", wanted=3 * GIB, available=2 * GIB)
    assert str(room) == "3.0 of 2.0 GiB free on n1"
