"""The workers of one training or evaluation: who this process is among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """The workers as one of them sees them; the process group is already there.

    Attributes:
        rank: this worker, from 0.
        world_size: number of workers.
        device: where its tensors live.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def current(cls) -> "WorkerGroup":
        """Describe this process in the default process group; one device a process is set already."""
        on_gpu = torch.cuda.is_available() and dist.get_backend() == "nccl"
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
        return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)

    @classmethod
    def alone(cls) -> "WorkerGroup":
        """Return a group of this process only, which needs no process group and computes on the CPU."""
        return cls(rank=0, world_size=1, device=torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        """The collective library that fits the device."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over the workers."""
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def start_total(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to sum a tensor on `device` over the workers, in place; return what waits for the sum."""
        if self.world_size == 1:
            return lambda: values
        work = dist.all_reduce(values, async_op=True)

        def total() -> Tensor:
            work.wait()  # on GPUs the stream waits, not this process
            return values

        return total

    def gather(self, value: Any) -> list[Any] | None:
        """Return every worker's value in rank order on the main worker, None elsewhere."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Return the main worker's value on every worker."""
        if self.world_size == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared)
        return shared[0]

    def exchange(
        self, outgoing: Tensor, num_outgoing: Sequence[int], num_incoming: Sequence[int]
    ) -> list[Tensor]:
        """Send every worker its bytes; all call together.

        Args:
            outgoing: 1-D uint8 on `device`, those for rank 0 first.
            num_outgoing: how many of them each rank gets.
            num_incoming: how many each rank has for this worker.

        Returns:
            What each rank sent, 1-D uint8.
        """
        if self.world_size == 1:
            return [outgoing]
        received = torch.empty(sum(num_incoming), dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(received, outgoing, list(num_incoming), list(num_outgoing))
        return list(received.split(list(num_incoming)))

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.world_size > 1:
            dist.barrier()


def set_collective_timeout(seconds: float) -> None:
    """Let collectives of every process group made from now on wait this long, whoever makes the group.

    DeepSpeed and others make groups of their own and give none: torch then takes its own default, which
    it has no function to change (10 minutes for NCCL, 30 for gloo).

    Args:
        seconds: after which a collective that some worker does not join fails.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timedelta(seconds=seconds))


def collective_timeout() -> float:
    """Return the seconds that `set_collective_timeout` set, else torch's own default."""
    return float(dist.distributed_c10d.default_pg_timeout.total_seconds())
