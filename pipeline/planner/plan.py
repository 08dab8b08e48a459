"""What a run will take, before anything is rented: memory of a worker, bytes sent, checkpoints.

Counted from the model's shapes alone (it is built on the meta device) and from how DeepSpeed lays out
ZeRO's stages; activations are an estimate.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from mgpp import (
    METHODS,
    Allocation,
    Coverage,
    OneShotMethod,
    coverage_of,
    grouped_parameters,
    transposed_weights,
)
from mgpp.masking import lamp
from mgpp.masking.threshold import sent_bytes
from mgpp.sharding.displacement import NUM_BINS
from pipeline.errors import ConfigError, Problem
from pipeline.models.settings import build_empty
from pipeline.planner.evaluation import evaluation_bytes
from pipeline.planner.memory import (
    MASTER,
    activation_bytes,
    bucket_bytes,
    checkpoint_bytes,
    copied_bytes,
    distillation_bytes,
    state_bytes,
)
from pipeline.planner.pinned import pinned_blocks, rounding_bytes
from pipeline.planner.speed import step_flops
from pipeline.pruning.one_shot import prunable_layers
from pipeline.runs.config import RunConfig
from pipeline.runs.node_memory import HeldWhole, held_whole
from pipeline.saving.contents import contents_of, export_bytes
from pipeline.tasks import make_task
from pipeline.training.engine import freeze
from pipeline.training.teacher import in_terms_of_teacher

_STATISTIC = 8  # bytes a number: float64
WORKER_BYTES = 6 * 2**30  # a worker's Python, libraries, CUDA context and rows
SYSTEM_BYTES = 8 * 2**30  # the operating system, Ray, and Ray's store of objects
CHECKPOINT_COPY = "copy of a checkpoint"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take. All sizes are bytes; memory is that of one worker.

    Attributes:
        num_parameters: of the model.
        num_prunable: of them, those that are pruned.
        weights: the whole model once, in the run's precision.
        device: memory on the worker's device, by what it is for.
        host: memory beside it that offload and the copy of a checkpoint take, by what it is for.
        evaluation: memory on the device while a model is evaluated, by what it is for.
        copy_if_room: whether a checkpoint is copied only where a node has room for that.
        held_whole: what each worker holds whole in its node's memory; None if nothing.
        sent_per_step: sent by a worker for one optimizer step.
        flops_per_step: floating-point operations of a worker for one optimizer step.
        sent_per_pruning: sent by a worker for one pruning, at most; what lies on several workers of a
            pattern's groups and blocks comes on top, and with min_kept as often as weights reach it.
        checkpoint: one checkpoint, all workers together.
        checkpoints: what storage holds of them at most: those that are kept, and one being written.
        export: memory of the export's process, on one node.
        coverage: how much of the model is prunable.
    """

    num_parameters: int
    num_prunable: int
    weights: int
    device: dict[str, int]
    host: dict[str, int]
    evaluation: dict[str, int]
    copy_if_room: bool
    held_whole: HeldWhole | None
    sent_per_step: int
    flops_per_step: int
    sent_per_pruning: int
    checkpoint: int
    checkpoints: int
    export: int
    coverage: Coverage

    @property
    def device_total(self) -> int:
        """All memory on the device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """All memory beside the device's."""
        return sum(self.host.values())

    @property
    def evaluation_total(self) -> int:
        """All memory on the device while a model is evaluated."""
        return sum(self.evaluation.values())

    def node_bytes(self, num_workers: int, *, has_gpus: bool) -> int:
        """Return the memory that a node of so many workers needs.

        What offload takes of each worker (without GPUs all that is planned), `WORKER_BYTES` a worker, the
        export's process, and `SYSTEM_BYTES`.

        Args:
            num_workers: on the node.
            has_gpus: whether devices have memory of their own.
        """
        each = self.host_total
        if self.copy_if_room:
            each -= self.host.get(CHECKPOINT_COPY, 0)
        if not has_gpus:
            each = max(each + self.device_total, self.evaluation_total)
        whole = 0 if self.held_whole is None else self.held_whole.size  # before there is any state
        return num_workers * (max(each, whole) + WORKER_BYTES) + self.export + SYSTEM_BYTES


def plan_run(config: RunConfig) -> Plan:
    """Return what a run's pruning stage will take.

    Raises:
        ConfigError: if the model's configuration cannot be read.
    """
    empty = build_empty(
        config.model.model_copy(update={"random_init": True}), make_task(config.task).auto_model
    )
    if config.prune.one_shot is not None:
        return plan_one_shot(config, empty, config.prune.one_shot)
    freeze(empty, config.train.freeze)
    world_size = config.cluster.num_workers
    micro = config.train.rows_of_a_pass(world_size)
    micro_batches = _num_micro_batches(config, micro)
    names = config.prune.settings.select(empty)
    weights = dict(empty.named_parameters())
    shapes = {name: tuple(weights[name].shape) for name in names}
    allocation = config.prune.allocation(shapes, transposed_weights(empty))
    sent = _sent_per_pruning(allocation, world_size)
    total = sum(p.numel() for p in weights.values())
    trained = sum(p.numel() for p in weights.values() if p.requires_grad)
    prunable = sum(weights[name].numel() for name in names)
    on_gpu = config.cluster.gpus > 0
    num_kept = len(METHODS[config.prune.method.name].state_names)
    num_masks = 2 if config.prune.settings.keep_zeros else 1
    device, host = state_bytes(
        config.zero,
        total,
        trained,
        prunable,
        world_size,
        num_kept,
        num_masks,
        accumulated=micro_batches > 1,
        largest=max(p.numel() for p in weights.values() if p.requires_grad),
    )
    host["pinned blocks rounded up"] = _rounding(
        config, empty, names, accumulated=micro_batches > 1
    )
    device["buckets"] = bucket_bytes(config.zero, on_gpu, total)
    if config.train.checkpoint_every and config.train.checkpoint_writing != "foreground":
        host[CHECKPOINT_COPY] = copied_bytes(
            config.zero, trained, prunable, world_size, num_kept, num_masks
        )
    batch: dict[str, int] = {
        "rows": micro,
        "length": config.task.max_length,
        "target_length": getattr(config.task, "max_target_length", 0),
        "width": config.zero.dtype.itemsize,
    }
    device["activations (estimate)"] = activation_bytes(
        empty, **batch, recomputed=config.train.gradient_checkpointing
    )
    checkpoint = checkpoint_bytes(trained, prunable, num_kept, num_masks)
    of_teacher = 0
    if config.distill is not None:
        of_teacher = _num_teacher_parameters(config, total)
        sharded = config.zero.stage == 3
        held = (-(-of_teacher // world_size) if sharded else of_teacher) * batch["width"]
        # Offloaded as the student's parameters are.
        if not config.zero.offload_parameters:
            device["teacher"] = held
        elif not config.zero.nvme_path:
            host["teacher"] = held
        device["distillation (estimate)"] = distillation_bytes(empty, config.distill, **batch)
    return Plan(
        num_parameters=total,
        num_prunable=prunable,
        weights=total * batch["width"],
        device={name: size for name, size in device.items() if size},
        host={name: size for name, size in host.items() if size},
        evaluation=evaluation_bytes(config, empty, total),
        copy_if_room=config.train.checkpoint_writing == "auto",
        held_whole=held_whole(config, empty),
        sent_per_step=_sent_per_step(config, total, trained, of_teacher, micro),
        flops_per_step=step_flops(
            empty,
            rows=micro * micro_batches,
            length=batch["length"],
            target_length=batch["target_length"],
            recomputed=config.train.gradient_checkpointing,
            of_teacher=of_teacher,
        ),
        sent_per_pruning=sent if config.zero.stage else 8 * world_size,
        checkpoint=checkpoint,
        checkpoints=checkpoint * (config.train.checkpoints_kept + 1),
        export=_export_bytes(empty, config),
        coverage=coverage_of(empty, names, config.prune.settings.exclude),
    )


def _rounding(config: RunConfig, empty: nn.Module, names: list[str], *, accumulated: bool) -> int:
    """Return by how much more is allocated for a worker's pinned blocks than DeepSpeed asks for."""
    blocks = pinned_blocks(
        config.zero,
        [
            [parameter.numel() for parameter in group["params"]]
            for group in grouped_parameters(empty, names, weight_decay=0.0)
        ],
        config.cluster.num_workers,
        accumulated=accumulated,
        on_gpu=config.cluster.gpus > 0,
    )
    return rounding_bytes(blocks)


def _export_bytes(empty: nn.Module, config: RunConfig) -> int:
    return export_bytes(contents_of(empty.to(config.zero.dtype)))


def _sent_per_pruning(allocation: Allocation, world_size: int) -> int:
    """Return the most that a worker of a sharded model hands to reductions in one pruning, in bytes."""
    num_weights = len(allocation.names)  # matrices: each of a stack is counted by itself
    if allocation.placement.scope == "lamp":
        cuts = sent_bytes(world_size, num_weights, num_weights)
        return cuts + lamp.sent_bytes(world_size, num_weights) + 8 * NUM_BINS
    num_groups = len(allocation.groups(allocation.num_pruned(step=1), step=1))
    return sent_bytes(world_size, num_weights, num_groups) + 8 * NUM_BINS


def plan_one_shot(config: RunConfig, empty: nn.Module, method: OneShotMethod) -> Plan:
    """Return what pruning in one shot will take: a layer at a time is on the device.

    Args:
        config: of the run.
        empty: the model, on the meta device.
        method: how it is pruned.

    Raises:
        ConfigError: if the method does not go with the model or the task.
    """
    names = config.prune.settings.select(empty)
    try:
        layers = prunable_layers(empty, make_task(config.task), names, method)
    except ValueError as error:
        raise ConfigError([Problem("prune.method", f"{method.name}: {error}")]) from error
    width, hidden = (
        config.zero.dtype.itemsize,
        int(cast(Any, empty).config.get_text_config().hidden_size),
    )
    world_size, length = config.cluster.num_workers, config.task.max_length
    matrices = [[matrix.rows() for matrix in layer.matrices.values()] for layer in layers]
    statistics = [
        [math.prod(method.statistic_shape(weight.shape[1])) for weight in layer]
        for layer in matrices
    ]
    largest_statistic = max(max(layer, default=0) for layer in statistics)
    largest_matrix = max(weight.numel() for layer in matrices for weight in layer)
    total = sum(p.numel() for p in empty.parameters())
    prunable = sum(empty.get_parameter(name).numel() for name in names)
    largest_layer = max(sum(p.numel() for p in layer.module.parameters()) for layer in layers)
    return Plan(
        num_parameters=total,
        num_prunable=prunable,
        weights=total * width,
        device={
            "parameters of a layer": largest_layer * width,
            "statistics of a layer": max(sum(layer) for layer in statistics) * _STATISTIC,
            "pruning a matrix (estimate)": 4 * MASTER * (largest_statistic + largest_matrix),
            "activations (estimate)": 17 * width * length * hidden,
        },
        host={
            "parameters": total * width,
            "calibration": -(-config.prune.calibration_rows // world_size)
            * length
            * hidden
            * width,
        },
        evaluation=evaluation_bytes(config, empty, total),
        copy_if_room=False,
        held_whole=held_whole(config, empty),
        sent_per_step=0,
        flops_per_step=0,
        # By ring algorithms: statistics are reduced, weights handed on.
        sent_per_pruning=int(
            (world_size - 1)
            / world_size
            * (2 * _STATISTIC * sum(sum(layer) for layer in statistics) + width * prunable)
        ),
        checkpoint=prunable * width,
        checkpoints=prunable * width,
        export=_export_bytes(empty, config),
        coverage=coverage_of(empty, names, config.prune.settings.exclude),
    )


def _num_teacher_parameters(config: RunConfig, total: int) -> int:
    """Return the parameters of the teacher; the dense fine-tune is a model like its student."""
    assert config.distill is not None
    model = config.distill.model(config.model)
    if model is None:
        return total
    with in_terms_of_teacher():
        teacher = build_empty(
            model.model_copy(update={"random_init": True}), make_task(config.task).auto_model
        )
    return sum(p.numel() for p in teacher.parameters())


def _num_micro_batches(config: RunConfig, micro: int) -> int:
    """Return how many micro-batches a worker goes through for one optimizer step."""
    return max(config.train.batch_size // (micro * config.cluster.num_workers), 1)


def _sent_per_step(config: RunConfig, total: int, trained: int, of_teacher: int, micro: int) -> int:
    """Return what a worker sends for one optimizer step, by ring algorithms."""
    world_size, zero = config.cluster.num_workers, config.zero
    width, summed = zero.dtype.itemsize, zero.gradient_dtype.itemsize
    accumulation = _num_micro_batches(config, micro)
    share = (world_size - 1) / world_size
    # Gathered for each forward and backward pass, reduced in each; a teacher only runs forward.
    if zero.stage == 3:
        each = width * (2 * total + of_teacher) + summed * trained
        return int(share * accumulation * each)
    # Gradients are reduced to all workers (at stage 2 in each micro-batch), which is twice as much as to
    # one each; stages 1 and 2 gather parameters.
    reductions = accumulation if zero.stage == 2 else 1
    gathered = width if zero.stage else 0
    return int(share * trained * (2 * summed * reductions + gathered))
