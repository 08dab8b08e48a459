"""Whether nodes hold what each worker holds whole: GGUF files as they load, models pruned in one shot."""

from dataclasses import dataclass

from torch import nn

from pipeline.errors import Problem
from pipeline.models.settings import build_empty
from pipeline.runs.config import RunConfig
from pipeline.runs.hardware import Capacity
from pipeline.tasks import make_task

_DEQUANTIZED = 8  # bytes an element of the tensor that is read: float32, and a copy of it


@dataclass(frozen=True, kw_only=True)
class HeldWhole:
    """What each worker of a run holds whole in its node's memory, whatever the ZeRO stage.

    Attributes:
        key: of the setting that asks for it.
        why: in words.
        hint: what else to do.
        size: bytes a worker.
    """

    key: str
    why: str
    hint: str
    size: int


def held_whole(config: RunConfig, empty: nn.Module) -> HeldWhole | None:
    """Return what each worker of a settled run holds whole; None if that is nothing.

    Args:
        config: of the run.
        empty: the model, on the meta device.
    """
    total, width = sum(p.numel() for p in empty.parameters()), config.zero.dtype.itemsize
    if config.model.gguf_file:
        return HeldWhole(
            key="model.gguf_file",
            why="each worker dequantizes the whole file",
            hint="convert it to safetensors, of which each worker keeps its part",
            size=total * width + max(p.numel() for p in empty.parameters()) * _DEQUANTIZED,
        )
    if config.prune.one_shot is not None:
        return HeldWhole(
            key="prune.method",
            why=f"{config.prune.method.name} prunes in one shot: each worker holds the whole model",
            hint="have fewer workers (cluster.num_workers): one is enough",
            size=total * width,
        )
    return None


def node_memory_problems(config: RunConfig, capacity: Capacity) -> list[Problem]:
    """Return which nodes cannot hold what each of their workers holds whole.

    Args:
        config: of a run, settled.
        capacity: what the cluster has.
    """
    if not capacity.memory or not (config.model.gguf_file or config.prune.one_shot):
        return []
    held = held_whole(config, build_empty(config.model, make_task(config.task).auto_model))
    assert held is not None
    cluster = config.cluster
    for workers, memory in capacity.placed(cluster):
        problem = too_large(held, workers, memory)
        if problem is not None:
            return [problem]
    return []


def too_large(held: HeldWhole, num_workers: int, memory: float) -> Problem | None:
    """Return what to say if a node of so many workers and bytes of memory cannot hold it."""
    if num_workers * held.size <= memory:
        return None
    workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    return Problem(
        held.key,
        f"{held.why}: {_gib(held.size)}, {_gib(num_workers * held.size)} for {workers} on a node, which "
        f"has {_gib(memory)}",
        hint=f"{held.hint}, or use nodes of more memory, or more of them",
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
