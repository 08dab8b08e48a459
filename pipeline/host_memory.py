"""The memory that a node has left, for all workers of it together."""

import socket
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.worker_group import WorkerGroup

_SHARE = 0.8  # of what is free, that a copy may take: the rest is for what grows beside it
_CGROUPS = Path("/sys/fs/cgroup")
_GIB = 1 << 30


def available_bytes() -> int:
    """Return what this process could still take: of the machine, or of its control groups' limits."""
    available = int(psutil.virtual_memory().available)
    return min([available, *_left_of_cgroups(_CGROUPS, _own_cgroup())])


@dataclass(frozen=True, kw_only=True)
class Room:
    """Whether nodes have room for what their workers want, where there is least.

    Attributes:
        fits: on every node.
        node: where the largest share of what is free would be taken.
        wanted: bytes by all workers of that node.
        available: bytes that are free there.
    """

    fits: bool
    node: str
    wanted: int
    available: int

    def __str__(self) -> str:
        return f"{self.wanted / _GIB:.1f} of {self.available / _GIB:.1f} GiB free on {self.node}"


def room_on_nodes(wanted: int, workers: WorkerGroup) -> Room:
    """Return whether every worker's node has room for all of its workers; the same on all workers.

    Args:
        wanted: bytes that this worker wants.
        workers: all of them; all call.
    """
    found = workers.gather((socket.gethostname(), wanted, available_bytes()))
    room: Room = workers.broadcast(_tightest(found) if found else None)
    return room


def _tightest(found: list[tuple[str, int, int]]) -> Room:
    by_node: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for node, wanted, available in found:
        by_node[node].append((wanted, available))
    sums = {
        node: (sum(wanted for wanted, _ in each), min(available for _, available in each))
        for node, each in by_node.items()
    }
    node = max(sums, key=lambda name: sums[name][0] / max(sums[name][1], 1))
    wanted, available = sums[node]
    return Room(fits=wanted <= _SHARE * available, node=node, wanted=wanted, available=available)


def _own_cgroup() -> str:
    """Return the path of this process's control group (version 2); "/" where there is none."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _left_of_cgroups(root: Path, path: str) -> list[int]:
    """Return what the limits of a control group and of those around it leave, where there are any."""
    folder, left = root / path.strip("/"), []
    for group in [folder, *folder.parents]:
        if not group.is_relative_to(root):
            break
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            if limit != "max":
                used = int((group / "memory.current").read_text(encoding="ascii"))
                left.append(max(int(limit) - used + _reclaimable(group), 0))
        except (OSError, ValueError):
            continue  # the root group has no limits, and a container may not show its parents
    return left


def _reclaimable(group: Path) -> int:
    """Return the bytes of files in memory that are counted as used and given back when needed."""
    for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0
