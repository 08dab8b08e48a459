"""What a run will take, before anything is rented: memory of a worker, bytes sent, checkpoints.

Counted from the model's shapes alone (it is built on the meta device) and from how DeepSpeed lays out
ZeRO's stages; activations are an estimate.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from mgpp import select_prunable, transposed_weights
from mgpp.threshold import sent_bytes
from pipeline.config import RunConfig
from pipeline.engine import freeze
from pipeline.model import build_empty
from pipeline.tasks import make_task
from pipeline.zero import DTYPES, ZeroConfig, default_bucket

_SUB_GROUP = 10**9  # elements of a shard that ZeRO 3 steps at once, by default
_MASTER, _MOMENTS = 4, 8  # bytes a weight: float32, and AdamW's two averages


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take. All sizes are bytes; memory is that of one worker.

    Attributes:
        num_parameters: of the model.
        num_prunable: of them, those that are pruned.
        device: memory on the worker's device, by what it is for.
        host: memory beside it that offload takes, by what it is for.
        sent_per_step: sent by a worker for one optimizer step.
        sent_per_pruning: sent by a worker for one pruning, at most; what lies on several workers of a
            pattern's groups and blocks comes on top, and with min_kept as often as weights reach it.
        checkpoint: one checkpoint, all workers together.
    """

    num_parameters: int
    num_prunable: int
    device: dict[str, int]
    host: dict[str, int]
    sent_per_step: int
    sent_per_pruning: int
    checkpoint: int

    @property
    def device_total(self) -> int:
        """All memory on the device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """All memory that offload takes."""
        return sum(self.host.values())


def plan_run(config: RunConfig) -> Plan:
    """Return what a run's pruning stage will take.

    Raises:
        ConfigError: if the model's configuration cannot be read.
    """
    empty = build_empty(
        config.model.model_copy(update={"random_init": True}), make_task(config.task).auto_model
    )
    freeze(empty, config.train.freeze)
    world_size = config.cluster.num_workers
    micro = config.train.micro_batch_size or max(config.train.batch_size // world_size, 1)
    names = select_prunable(empty, config.prune.include, config.prune.exclude)
    weights = dict(empty.named_parameters())
    shapes = {name: tuple(weights[name].shape) for name in names}
    allocation = config.prune.allocation(shapes, transposed_weights(empty))
    num_groups = len(allocation.groups(allocation.num_going(step=1), step=1))
    total = sum(p.numel() for p in weights.values())
    trained = sum(p.numel() for p in weights.values() if p.requires_grad)
    prunable = sum(weights[name].numel() for name in names)
    on_gpu = config.cluster.gpus_per_worker > 0
    device, host = state_bytes(config.zero, total, trained, prunable, world_size)
    device["buckets"] = _bucket_bytes(config.zero, on_gpu, total)
    device["activations (estimate)"] = activation_bytes(
        empty,
        tokens=micro * config.task.max_length,
        length=config.task.max_length,
        width=DTYPES[config.zero.precision].itemsize,
        recomputed=config.train.gradient_checkpointing,
    )
    return Plan(
        num_parameters=total,
        num_prunable=prunable,
        device={name: size for name, size in device.items() if size},
        host={name: size for name, size in host.items() if size},
        sent_per_step=_sent_per_step(config, total, trained, micro),
        sent_per_pruning=sent_bytes(world_size, len(names), num_groups)
        if config.zero.stage
        else 8 * world_size,
        checkpoint=checkpoint_bytes(trained, prunable),
    )


def checkpoint_bytes(trained: int, prunable: int) -> int:
    """Return what one checkpoint takes: master weights, Adam's moments, masks."""
    return trained * (_MASTER + _MOMENTS) + prunable // 8


def state_bytes(
    zero: ZeroConfig, total: int, trained: int, prunable: int, world_size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return what parameters, gradients, optimizer and masks take of one worker, at the optimizer's step.

    Args:
        zero: how state is sharded.
        total: parameters of the model.
        trained: of them, those that are trained.
        prunable: of them, those that are pruned.
        world_size: workers.

    Returns:
        By what it is for: bytes on the device, and bytes in the host's memory.
    """
    width = DTYPES[zero.precision].itemsize
    shard = -(-trained // world_size)
    optimizer = (zero.stage and shard) or trained
    parameters = total * width if zero.stage < 3 else -(-total // world_size) * width
    # Under ZeRO 1-3 the float32 gradient of a shard is made for the step, beside what was reduced.
    if zero.stage == 0:
        gradients, stepping = trained * width, 0 if width == _MASTER else trained * _MASTER
        master = 0 if width == _MASTER else trained * _MASTER
    else:
        at_once = (
            min(shard, _SUB_GROUP) if zero.stage == 3 and not zero.offload_optimizer else shard
        )
        stepping, master = at_once * _MASTER, shard * _MASTER
        # Stage 1 holds whole gradients until the backward pass ends, before those of the step are made.
        whole = trained * width - stepping if zero.stage == 1 else 0
        gradients = max(whole, shard * width)
    states = {
        "master weights": master,
        "optimizer": optimizer * _MOMENTS,
        "gradients of the step": stepping,
        "masks": -(-(prunable if zero.stage == 0 else -(-prunable // world_size)) // 8),
    }
    device = {"parameters": parameters, "gradients": gradients}
    host: dict[str, int] = {}
    (host if zero.offload_optimizer else device).update(states)
    if zero.offload_parameters:
        parameters = device.pop("parameters")
        host["parameters"] = 0 if zero.nvme_path else parameters
    return device, host


def activation_bytes(
    model: nn.Module, *, tokens: int, length: int, width: int, recomputed: bool
) -> int:
    """Estimate what the forward pass keeps for the backward pass, and the logits.

    34 bytes a token, layer and unit of width at 16 bits (Korthikanti et al., arXiv 2205.05198, without
    the attention matrix, which fused attention does not keep); with recomputation 2, and one layer whole.

    Args:
        model: on the meta device.
        tokens: of one micro-batch.
        length: of one row.
        width: bytes of a number.
        recomputed: whether layers are recomputed in the backward pass.
    """
    settings: Any = model.config
    hidden = int(settings.hidden_size)
    layers = int(settings.num_hidden_layers)
    layer = 17 * width * tokens * hidden
    kept = layers * width * tokens * hidden + layer if recomputed else layers * layer
    predicts_tokens = cast(Any, model).get_output_embeddings() is not None
    classes = int(settings.vocab_size if predicts_tokens else settings.num_labels)
    rows = tokens if predicts_tokens else tokens // length
    return kept + 2 * rows * classes * 4  # logits and their gradient, in float32


def _bucket_bytes(zero: ZeroConfig, on_gpu: bool, total: int) -> int:
    """Return the buffers that reductions and gathers are made in."""
    bucket = zero.bucket_elements or default_bucket(on_gpu)
    width = DTYPES[zero.precision].itemsize
    if zero.stage == 0:
        return 0
    reducing = bucket * width * (2 if on_gpu else 1)  # two that take turns where they overlap
    gathered = min(10 * bucket, total) if zero.stage == 3 else min(bucket, total)
    return reducing + gathered * width


def _sent_per_step(config: RunConfig, total: int, trained: int, micro: int) -> int:
    """Return what a worker sends for one optimizer step, by ring algorithms."""
    world_size, zero = config.cluster.num_workers, config.zero
    width = DTYPES[zero.precision].itemsize
    accumulation = max(config.train.batch_size // (micro * world_size), 1)
    share = (world_size - 1) / world_size
    if zero.stage == 3:  # gathered for each forward and backward pass, reduced in each
        return int(share * width * accumulation * (2 * total + trained))
    # Gradients are reduced (at stage 2 in each micro-batch) and parameters or gradients gathered.
    reductions = accumulation if zero.stage == 2 else 1
    return int(share * width * trained * (reductions + 1))
