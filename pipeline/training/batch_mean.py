"""Means over a step's whole batch, from means over micro-batches that hold more or fewer targets.

The losses of models are means over the targets of the rows they are given, and DeepSpeed takes the mean
over micro-batches and ranks. The mean of means is that over the whole batch only where every micro-batch
has as many targets; so each is multiplied first by its own number over the mean number.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.tasks import Task
from pipeline.tasks.base import UNLABELLED
from pipeline.worker_group import WorkerGroup

_BESIDE_THE_TASK = ("aux_loss", "z_loss")  # what names of outputs end in: of routers and the like


class Weights:
    """What means over a micro-batch are multiplied by, n M / N: their mean is then the whole batch's.

    n is what the micro-batch holds, N what the step's batch holds, M the micro-batches of all ranks. Each
    is a float32 scalar, 1 where all micro-batches hold as many.

    Args:
        both: returns them, float32 [2]; called when one is first asked for, after the forward pass, so
            that no rank waits for the sum over ranks before it.
    """

    def __init__(self, both: Callable[[], Tensor]) -> None:
        self._read = both

    @property
    def targets(self) -> Tensor:
        """Of a mean over targets: tokens with a label, or rows."""
        return self._both[0]

    @property
    def tokens(self) -> Tensor:
        """Of a mean over the tokens that are attended to."""
        return self._both[1]

    @cached_property
    def _both(self) -> Tensor:
        return self._read()


WHOLE = Weights(lambda: torch.ones(2))
"""Of a batch that is one micro-batch."""


def weigh(
    task: Task,
    micro_batches: Sequence[Mapping[str, Tensor]],
    workers: WorkerGroup,
    *,
    flag: bool = False,
) -> tuple[list[Weights], Callable[[], bool]]:
    """Return the weights of this rank's micro-batches of a step; all ranks call, with as many each.

    One all-reduce of three numbers, which runs during the forward pass.

    Args:
        task: of the batches.
        micro_batches: this rank's of the step.
        workers: all of them.
        flag: of this rank.

    Returns:
        The weights by micro-batch, and what returns, the same on all ranks, whether any rank's flag is
        set. Asked after the passes, it waits for the sum alone, on a GPU too.
    """
    counts = torch.tensor(
        [[task.num_targets(batch), num_attended(batch), 0.0] for batch in micro_batches],
        dtype=torch.float64,
    )
    counts[0, 2] = float(flag)
    counts = counts.to(workers.device)
    total = workers.start_total(counts.sum(dim=0))
    num_micro_batches = len(micro_batches) * workers.world_size

    def weight(count: Tensor) -> Tensor:
        return (count * num_micro_batches / total()[:2].clamp(min=1)).float()

    return [Weights(partial(weight, count[:2])) for count in counts], _flag_of(
        total, workers.device
    )


def _flag_of(total: Callable[[], Tensor], device: torch.device) -> Callable[[], bool]:
    """Return what tells whether the third number of a sum under way is not 0."""
    if device.type != "cuda":
        return lambda: bool(total()[2] > 0)
    # On a stream of its own: on the passes' own one it would be read after them, with the GPU idle.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = torch.empty(3, dtype=torch.float64, pin_memory=True)
        on_host.copy_(total(), non_blocking=True)
        copied = stream.record_event()

    def flag() -> bool:
        copied.synchronize()
        return bool(on_host[2] > 0)

    return flag


def num_attended(batch: Mapping[str, Tensor]) -> int:
    """Return how many input tokens of a batch are attended to."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def with_a_target(task: Task, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with one target at least: a mean over none is not a number, also times 0."""
    if task.num_targets(batch):
        return batch
    labels = batch["labels"].clone()
    labels[0, -1] = 0  # any token; the weight of this batch is 0
    return {**batch, "labels": labels}


def weighted_loss(outputs: Any, batch: Mapping[str, Tensor], task: Task, weight: Tensor) -> Tensor:
    """Return the loss of a model's outputs with its mean over targets weighted.

    What the model adds to that for itself (the auxiliary losses of routers) is a mean over micro-batches,
    and counts once. Of a model that was given no labels, it is the loss of the next token.
    """
    loss: Tensor | None = outputs.get("loss")
    if loss is None:
        return _mean_loss(outputs, batch, task) * weight
    beside = [name for name in outputs if name.endswith(_BESIDE_THE_TASK)]
    if not any(outputs[name] is not None for name in beside):
        return loss * weight
    mean = _mean_loss(outputs, batch, task)
    return loss - mean + mean * weight


def _mean_loss(outputs: Any, batch: Mapping[str, Tensor], task: Task) -> Tensor:
    (logits,) = task.distillation_outputs(outputs, batch)
    labels = task.targets(batch)
    return functional.cross_entropy(logits.float(), labels[labels != UNLABELLED])
