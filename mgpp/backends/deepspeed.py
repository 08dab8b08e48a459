"""DeepSpeed ZeRO 0-3: where this rank's float32 shards lie, and hooks on the client optimizer.

The optimizer handed to `deepspeed.initialize` is, at its `step`, given exactly this rank's float32
partition and its gradient: reduced, averaged, accumulated, unscaled and clipped. So two hooks on it,
with the prunable weights in a parameter group of their own, see all that pruning needs, and what the
second one writes is copied to the low-precision weights by ZeRO itself.

    stage             inner steps         the shards are ranges of
    0                 1                   the parameters, or their float32 copies (replicated)
    1, 2              1 a group           one flat partition a group
    1, bf16 + fp32    1                   the same (BF16_Optimizer)
    3                 1 a sub-group       one flat partition a sub-group

The same knowledge of the layout serves checkpoints: `training_state` gives what this rank holds of every
trained parameter by name and range, so that another world size or stage can take it up.

This is the one file that knows DeepSpeed's insides; it was written against 0.19.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgpp.collectives import Collectives
from mgpp.methods.base import Method
from mgpp.pruner import Pruner
from mgpp.schedule import PruningSchedule
from mgpp.shards import Shard


@dataclass(frozen=True)
class _Layout:
    """This rank's shards by the flat tensor they are ranges of, in the order of the updates."""

    flats: list[Tensor]
    shards: list[list[Shard]]
    replicated: bool


def attach(
    engine: Any,
    prunable: Mapping[str, nn.Parameter],
    *,
    method: Method,
    schedule: PruningSchedule,
) -> Pruner:
    """Prune under a DeepSpeed engine, sharded as its ZeRO stage shards.

    Call it after `deepspeed.initialize`, on every rank. The optimizer given to `initialize` must be a
    client optimizer whose FIRST parameter group holds the prunable weights and nothing else.

    Args:
        engine: what `deepspeed.initialize` returned.
        prunable: the model's prunable parameters by name, in the model's order.
        method: what is added to plain magnitude pruning.
        schedule: when to prune and how far; its steps count updates really made, not those DeepSpeed
            skips on overflow.

    Returns:
        The pruner, for its state and its figures.

    Raises:
        ValueError: for a mode in which DeepSpeed is wrong or cannot be hooked, with what to use.
        RuntimeError: if the layout is not the one this file knows.
    """
    _refuse_unsupported(engine)
    group = engine.basic_optimizer.param_groups[0]
    layout = _layout(engine, group, prunable)
    witnesses = Collectives.over(_dp_group(engine), _collective_device(engine))
    collectives = Collectives() if layout.replicated else witnesses
    shards = sorted((s for unit in layout.shards for s in unit), key=lambda shard: shard.index)
    shapes = {name: _full_shape(parameter) for name, parameter in prunable.items()}
    pruner = Pruner(
        shards,
        shapes,
        method=method,
        schedule=schedule,
        collectives=collectives,
        witnesses=witnesses,
        group=group,
    )
    _hook(engine, group, layout, pruner)
    return pruner


def _hook(engine: Any, group: dict[str, Any], layout: _Layout, pruner: Pruner) -> None:
    unit_of = {id(flat): i for i, flat in enumerate(layout.flats)}
    updated: set[int] = set()

    def units(optimizer: Any) -> list[int]:
        # ZeRO 1/2 show the inner optimizer one group at a time; ZeRO 3 shows all, but only the
        # sub-group in turn has parameters. The dict object is the same throughout.
        if not any(shown is group for shown in optimizer.param_groups):
            return []
        flats = group["params"]
        return sorted({unit_of[id(flat)] for flat in flats})

    def before(optimizer: Any, *_: Any) -> None:
        for unit in units(optimizer):
            pruner.before_update(layout.shards[unit])

    def after(optimizer: Any, *_: Any) -> None:
        stepped = units(optimizer)
        for unit in stepped:
            pruner.after_update(layout.shards[unit])
        updated.update(stepped)
        if stepped and len(updated) == len(layout.flats):
            updated.clear()
            if pruner.finish_step() is not None and engine.zero_optimization_stage() == 3:
                _copy_earlier_sub_groups(engine, last=len(layout.flats) - 1)

    engine.basic_optimizer.register_step_pre_hook(before)
    engine.basic_optimizer.register_step_post_hook(after)


def _copy_earlier_sub_groups(engine: Any, last: int) -> None:
    """Copy what a pruning zeroed in sub-groups whose low-precision copy was already made.

    Only ZeRO 3 with several prunable sub-groups has any: each is copied right after its own update,
    before the last one is updated and the global threshold can be known. The copy of the last one,
    and the gathering of persistent parameters, follow in ZeRO's own step.
    """
    for sub_group in range(last):
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


# Training state, for checkpoints.


@dataclass(frozen=True, kw_only=True)
class TrainedPiece:
    """What this rank holds of one trained parameter, with what the optimizer keeps of it.

    Attributes:
        name: the parameter's name in the model.
        offset: where the piece begins in the flattened whole parameter, in elements.
        numel: elements in the piece.
        values: 1-D views of `numel` elements: "master", the float32 weights, and the optimizer's own
            ("exp_avg" and "exp_avg_sq" of Adam), which it has none of before its first step.
        counters: the optimizer's numbers for the parameter as a whole: "step" of Adam, a float where
            the optimizer keeps it as a tensor.
    """

    name: str
    offset: int
    numel: int
    values: dict[str, Tensor]
    counters: dict[str, float]


def training_state(engine: Any) -> Iterator[TrainedPiece]:
    """Give this rank's part of the training state by parameter and range.

    All ranks' pieces make up the whole state, each element once, but at stage 0, where every rank holds
    all of it. They do not depend on the stage or the number of ranks, so that any can take them up.
    """
    names = _names(engine)
    for piece in _pieces(engine):
        values = {"master": piece.part_of(piece.flat)}
        counters: dict[str, float] = {}
        for key, value in engine.basic_optimizer.state.get(piece.flat, {}).items():
            if not isinstance(value, Tensor):
                counters[key] = value
            elif value.dim() == 0:
                counters[key] = float(value)
            else:
                values[key] = piece.part_of(value)
        yield TrainedPiece(
            name=names[id(piece.parameter)],
            offset=piece.offset,
            numel=piece.numel,
            values=values,
            counters=counters,
        )


def load_training_state(
    engine: Any, read: Callable[[str, int, int], tuple[dict[str, Tensor], dict[str, float]]]
) -> None:
    """Take up a training state, whatever layout it was saved from; all ranks must call.

    Args:
        engine: what `deepspeed.initialize` returned.
        read: given a parameter's name, an offset and a number of elements, returns the values of that
            range and the counters, as in `TrainedPiece`.
    """
    names, optimizer = _names(engine), engine.basic_optimizer
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for piece in _pieces(engine):
        if piece.numel == 0:
            continue
        values, counters = read(names[id(piece.parameter)], piece.offset, piece.numel)
        piece.part_of(piece.flat).copy_(values.pop("master"))
        state = optimizer.state[piece.flat]
        for key, value in values.items():
            if key not in state:
                state[key] = torch.zeros_like(piece.flat, requires_grad=False)
            piece.part_of(state[key]).copy_(value)
        for key, number in counters.items():
            state[key] = number
            if isinstance(number, float):
                device = piece.flat.device if on_device else torch.device("cpu")
                state[key] = torch.tensor(number, dtype=torch.float32, device=device)
    _copy_to_low_precision(engine)


def engine_counters(engine: Any) -> dict[str, dict[str, float]]:
    """Return DeepSpeed's own counters and the fp16 loss scale's, as plain numbers."""
    return {
        "engine": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "loss_scaler": {k: v for k, v in _loss_scaler(engine).items() if k in _LOSS_SCALE},
    }


def load_engine_counters(engine: Any, saved: dict[str, dict[str, float]]) -> None:
    """Take up what `engine_counters` returned."""
    vars(engine).update(saved["engine"])
    _loss_scaler(engine).update(saved["loss_scaler"])


# Not micro_steps: it says where an accumulation ends, and that is another on another number of ranks.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _loss_scaler(engine: Any) -> dict[str, Any]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {} if scaler is None else vars(scaler)


def _names(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def _copy_to_low_precision(engine: Any) -> None:
    """Copy the float32 masters to the weights that the model computes with."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for piece in _pieces(engine):
            if piece.flat is not piece.parameter:
                piece.parameter.data.copy_(piece.flat)
    elif stage == 3:
        persistent = optimizer.persistent_parameters  # kept whole on every rank
        if persistent:
            persistent[0].partition(persistent)
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if persistent:
            persistent[0].all_gather(persistent)
    else:
        optimizer.update_lp_params()


# Where the pieces of parameters lie.


def _layout(engine: Any, group: dict[str, Any], prunable: Mapping[str, nn.Parameter]) -> _Layout:
    _check_group(_low_precision_groups(engine)[0], prunable)
    names = {
        id(parameter): (name, index) for index, (name, parameter) in enumerate(prunable.items())
    }
    flats = _flats_of_first_group(engine, group)
    by_flat: dict[int, list[Shard]] = {id(flat): [] for flat in flats}
    for piece in _pieces(engine):
        if id(piece.flat) in by_flat:
            name, index = names[id(piece.parameter)]
            by_flat[id(piece.flat)].append(piece.as_shard(name, index))
    for flat in flats:
        _zero_padding(flat, by_flat[id(flat)])
    replicated = engine.zero_optimization_stage() == 0
    return _Layout(flats, [by_flat[id(flat)] for flat in flats], replicated=replicated)


def _flats_of_first_group(engine: Any, group: dict[str, Any]) -> list[Tensor]:
    """The tensors whose updates make up the first group's, in their order."""
    if engine.zero_optimization_stage() != 3:
        return list(group["params"])
    optimizer = engine.optimizer
    ours = [i for i, group_id in optimizer.sub_group_to_group_id.items() if group_id == 0]
    return [optimizer.fp32_partitioned_groups_flat[i] for i in ours]


def _check_group(parameters: Sequence[Any], prunable: Mapping[str, nn.Parameter]) -> None:
    """Make sure that the first group holds what is pruned and nothing else, which would be zeroed.

    Raises:
        ValueError: naming a weight that is missing, or how many are too many.
    """
    found = {id(parameter) for parameter in parameters}
    missing = [name for name, parameter in prunable.items() if id(parameter) not in found]
    extra = len(found) - (len(prunable) - len(missing))
    if missing or extra:
        problem = f"{missing[0]} is not in it" if missing else f"it holds {extra} others too"
        raise ValueError(
            "the first parameter group of the optimizer given to deepspeed.initialize must hold the "
            f"prunable weights and nothing else, but {problem}: make its groups with "
            "mgpp.parameter_groups(model, config)"
        )


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What this rank holds of one trained parameter: a range of a float32 tensor of the optimizer."""

    parameter: nn.Parameter
    offset: int
    numel: int
    flat: Tensor
    start: int

    def part_of(self, tensor: Tensor) -> Tensor:
        """This piece's range of a tensor that is laid out like `flat`."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)

    def as_shard(self, name: str, index: int) -> Shard:
        return Shard(
            name=name,
            index=index,
            full_shape=_full_shape(self.parameter),
            offset=self.offset,
            numel=self.numel,
            flat=self.flat,
            start=self.start,
        )


def _pieces(engine: Any) -> Iterator[_Piece]:
    """Give this rank's pieces of all trained parameters, group by group."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _whole_parameters(engine)
    return _even_pieces(engine) if stage == 3 else _fragments_of_flats(engine)


def _whole_parameters(engine: Any) -> Iterator[_Piece]:
    """Stage 0: the optimizer's tensors are the parameters or their float32 copies, in the same order."""
    masters = [group["params"] for group in engine.basic_optimizer.param_groups]
    for parameters, flats in zip(_low_precision_groups(engine), masters, strict=True):
        for parameter, flat in zip(parameters, flats, strict=True):
            yield _Piece(parameter=parameter, offset=0, numel=flat.numel(), flat=flat, start=0)


def _fragments_of_flats(engine: Any) -> Iterator[_Piece]:
    """ZeRO 1/2 and BF16_Optimizer: one flat partition a group, cut where it comes."""
    groups = engine.basic_optimizer.param_groups
    for parameters, group in zip(_low_precision_groups(engine), groups, strict=True):
        (flat,) = group["params"]
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # no part of this parameter is on this rank
            yield _Piece(
                parameter=parameter,
                offset=mapping.lp_fragment_address.start,
                numel=mapping.hp_fragment_address.numel,
                flat=flat,
                start=mapping.hp_fragment_address.start,
            )


def _even_pieces(engine: Any) -> Iterator[_Piece]:
    """ZeRO 3: every parameter is cut evenly over the ranks; the last pieces may be padded or empty."""
    optimizer = engine.optimizer
    rank = dist.get_rank(_dp_group(engine))
    for parameters in _low_precision_groups(engine):
        for parameter in parameters:
            sub_group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = min(rank * size, parameter.ds_numel)
            yield _Piece(
                parameter=parameter,
                offset=offset,
                numel=min(parameter.ds_numel - offset, size),
                flat=optimizer.fp32_partitioned_groups_flat[sub_group],
                start=start,
            )


def _low_precision_groups(engine: Any) -> list[list[Any]]:
    """The model's trained parameters by the optimizer's groups, which wrappers name differently."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        groups: dict[int, list[Any]] = defaultdict(list)
        for sub_group, parameters in enumerate(optimizer.fp16_groups):
            groups[optimizer.sub_group_to_group_id[sub_group]] += parameters
        return [groups[i] for i in sorted(groups)]
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [group["params"] for group in optimizer.param_groups]  # float32 at stage 0: no wrapper


def _zero_padding(flat: Tensor, shards: Sequence[Shard]) -> None:
    """Zero what of a flat partition is no weight.

    Under ZeRO 3 it is uninitialised memory (NaN and 1e34 were seen) that would reach norms.
    """
    padding = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    for shard in shards:
        padding[shard.start : shard.start + shard.numel] = False
    flat.detach().view(-1).masked_fill_(padding, 0.0)


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's whole shape; under ZeRO 3 the parameter itself is emptied."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _dp_group(engine: Any) -> Any:
    """The group over which ZeRO shards; stage 0 has no optimizer of its own and shards over none."""
    return getattr(engine.optimizer, "dp_process_group", None) or engine.data_parallel_group


def _collective_device(engine: Any) -> torch.device:
    """Where counts must live to be reduced: NCCL takes only device tensors."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else engine.device)


# What DeepSpeed gets wrong.


def _refuse_unsupported(engine: Any) -> None:
    zero = engine._config.zero_config
    stage = engine.zero_optimization_stage()
    offload = zero.offload_optimizer
    problems = [
        (
            stage == 0 and engine.fp16_enabled(),
            "fp16 at ZeRO stage 0: DeepSpeed never scales the loss but divides the gradients by the "
            "scale; use ZeRO stage 1, or bf16",
        ),
        (
            stage == 0 and hasattr(engine.optimizer, "fp32_groups_flat"),
            "a fused optimizer at ZeRO stage 0: its master weights are flattened; use ZeRO stage 1, or "
            "torch.optim.AdamW",
        ),
        (
            zero.round_robin_gradients,
            "zero_optimization.round_robin_gradients: it reorders the flat partitions; turn it off",
        ),
        (
            offload is not None and offload.ratio < 1,
            "zero_optimization.offload_optimizer.ratio below 1: the part kept on the device is "
            "updated by a second optimizer without our hooks; set ratio to 1",
        ),
        (
            getattr(zero, "zenflow", None) is not None,
            "ZenFlow: its asynchronous updates pass by the optimizer's hooks; turn it off",
        ),
        (
            offload is not None and getattr(offload, "super_offload", False),
            "SuperOffload: its updates run in another process; turn it off",
        ),
        (
            offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme",
            "optimizer offload to NVMe: the master weights are not in memory at the threshold; use "
            "CPU offload",
        ),
    ]
    for wrong, reason in problems:
        if wrong:
            raise ValueError(f"cannot prune under this DeepSpeed configuration: {reason}")
