"""Training state by parameter and range, so that another world size or stage can restore it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgpp.backends.deepspeed.layout import parameter_shards


@dataclass(frozen=True, kw_only=True)
class TrainedShard:
    """What this rank holds of one trained parameter, with what the optimizer keeps of it.

    Attributes:
        name: the parameter's name in the model.
        offset: where the shard begins in the flattened whole parameter, in elements.
        numel: elements in the shard.
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


def training_state(engine: Any) -> Iterator[TrainedShard]:
    """Give this rank's part of the training state by parameter and range.

    All ranks' shards make up the whole state, each element once, but at stage 0, where every rank holds
    all of it. They do not depend on the stage or the number of ranks, so that any can restore them.
    """
    names = _names(engine)
    for shard in parameter_shards(engine):
        values = {"master": shard.part_of(shard.flat)}
        counters: dict[str, float] = {}
        for key, value in engine.basic_optimizer.state.get(shard.flat, {}).items():
            if not isinstance(value, Tensor):
                counters[key] = value
            elif value.dim() == 0:
                counters[key] = float(value)
            else:
                values[key] = shard.part_of(value)
        yield TrainedShard(
            name=names[id(shard.parameter)],
            offset=shard.offset,
            numel=shard.numel,
            values=values,
            counters=counters,
        )


def load_masters(
    engine: Any, read: Callable[[str, int, int], tuple[dict[str, Tensor], dict[str, float]]]
) -> None:
    """Restore this rank's masters and optimizer state, whatever layout they were saved from.

    No other rank is asked for anything. `copy_to_low_precision` must follow, on all ranks.

    Args:
        engine: what `deepspeed.initialize` returned.
        read: given a parameter's name, an offset and a number of elements, returns the values of that
            range and the counters, as in `TrainedShard`.
    """
    names, optimizer = _names(engine), engine.basic_optimizer
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for shard in parameter_shards(engine):
        if shard.numel == 0:
            continue
        values, counters = read(names[id(shard.parameter)], shard.offset, shard.numel)
        shard.part_of(shard.flat).copy_(values.pop("master"))
        state = optimizer.state[shard.flat]
        for key, value in values.items():
            if key not in state:
                state[key] = torch.zeros_like(shard.flat, requires_grad=False)
            shard.part_of(state[key]).copy_(value)
        for key, number in counters.items():
            state[key] = number
            if isinstance(number, float):
                device = shard.flat.device if on_device else torch.device("cpu")
                state[key] = torch.tensor(number, dtype=torch.float32, device=device)


def engine_counters(engine: Any) -> dict[str, dict[str, float]]:
    """Return DeepSpeed's own counters and the fp16 loss scale's, as plain numbers."""
    return {
        "engine": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "loss_scaler": {k: v for k, v in _loss_scaler(engine).items() if k in _LOSS_SCALE},
    }


def load_engine_counters(engine: Any, saved: dict[str, dict[str, float]]) -> None:
    """Restore what `engine_counters` returned."""
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


def copy_to_low_precision(engine: Any) -> None:
    """Copy the float32 masters to the weights that the model computes with; all ranks must call."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for shard in parameter_shards(engine):
            if shard.flat is not shard.parameter:
                shard.parameter.data.copy_(shard.flat)
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
