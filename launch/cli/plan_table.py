"""What `mgpp plan` prints: memory of a worker and of a node, bytes sent, times."""

from typing import Any

from rich.table import Table

from launch.cli.output import raise_for, size_text
from launch.cluster.node_sizes import workers_of_a_node
from pipeline.errors import Problem
from pipeline.runs.node_memory import too_large


def plan_table(settings: Any, found: Any, room: float | None) -> Table:
    """Return what a run needs, as a table."""
    zero, cluster = settings.zero, settings.cluster
    table = Table(
        title=f"{settings.name}: {found.num_parameters:,} parameters, {found.num_prunable:,} prunable; "
        f"ZeRO {zero.stage}, {zero.precision}, {cluster.num_workers} workers",
        title_justify="left",
        min_width=60,
    )
    table.add_column("per worker")
    table.add_column("", justify="right")
    for name, size in found.device.items():
        table.add_row(name, size_text(size))
    table.add_row("device total", size_text(found.device_total) + _fits(found.device_total, room))
    table.add_section()
    for name, size in found.evaluation.items():
        table.add_row(f"evaluation: {name}", size_text(size))
    total = found.evaluation_total
    table.add_row("evaluation total", size_text(total) + _fits(total, room))
    if room is not None:
        table.add_row("device memory available", size_text(room))
    if found.host:
        table.add_section()
        for name, size in found.host.items():
            table.add_row(f"host: {name}", size_text(size))
        table.add_row("host total", size_text(found.host_total))
    table.add_section()
    table.add_row("bytes sent per step", size_text(found.sent_per_step))
    table.add_row("bytes sent per pruning (max)", size_text(found.sent_per_pruning))
    table.add_row("checkpoint (all workers)", size_text(found.checkpoint))
    table.add_row("checkpoints in storage (max)", size_text(found.checkpoints))
    table.add_row("export (one node)", size_text(found.export))
    table.add_section()
    table.add_row("share of the layers' matrices that is prunable", f"{found.coverage.share:.1%}")
    for name, numel in found.coverage.left_out.items():
        table.add_row(f"not prunable: {name}", f"{numel:,}")
    return table


def _fits(size: float, room: float | None) -> str:
    if room is None:
        return ""
    return "  fits" if size <= room else "  DOES NOT FIT"


def planned_node(
    settings: Any, found: Any, nodes: int | None, memory_gib: float | None
) -> dict[str, Any] | None:
    """Return what a node needs, and whether it has that; None unless the nodes are counted.

    Raises:
        ConfigError: if memory is given without nodes, or a node cannot hold what each of its workers must
            hold whole.
    """
    if nodes is None:
        if memory_gib is not None:
            raise_for([Problem("--nodes", "missing: --node-memory-gib is that of each of them")])
        return None
    workers = workers_of_a_node(settings, nodes)
    memory = None if memory_gib is None else memory_gib * 2**30
    if found.held_whole is not None and memory is not None:
        problem = too_large(found.held_whole, workers, memory)
        raise_for([problem] if problem else [])
    needed = found.node_bytes(workers, has_gpus=settings.cluster.gpus > 0)
    fits = None if memory is None else needed <= memory
    return {"workers": workers, "needed": needed, "memory": memory, "fits": fits}


def add_node(table: Table, node: dict[str, Any] | None) -> None:
    """Add what a node needs to a plan's table."""
    if node is None:
        return
    table.add_section()
    needed, memory = node["needed"], node["memory"]
    label = f"memory of a node, {node['workers']} workers"
    table.add_row(label, size_text(needed) + _fits(needed, memory))
    if memory is not None:
        table.add_row("node memory available", size_text(memory))


def add_times(
    table: Table, time: Any, *, device_tflops: float | None, bandwidth_gbit: float | None
) -> None:
    """Add how long a step takes to a plan's table, with what is assumed of devices and network."""
    if device_tflops is None and bandwidth_gbit is None:
        return
    table.add_section()
    if device_tflops is not None:
        table.add_row(
            f"compute of a step, at {device_tflops:g} TFLOP/s a device", f"{time.compute:.3g} s"
        )
    if bandwidth_gbit is not None:
        table.add_row(
            f"communication of a step, at {bandwidth_gbit:g} Gbit/s a worker",
            f"{time.communication:.3g} s",
        )
    if time.shortest is not None:
        table.add_row("a step, if they overlap entirely", f"{time.shortest:.3g} s")
        table.add_row("a step, if they do not overlap", f"{time.longest:.3g} s")
