"""Where this rank's shards of parameters lie, stage by stage."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgpp.sharding.shards import Shard


@dataclass(frozen=True)
class Layout:
    """This rank's shards by the flat tensor they are ranges of, in the order of the updates."""

    flats: list[Tensor]
    shards: list[list[Shard]]
    replicated: bool


def layout_of(engine: Any, group: dict[str, Any], prunable: Mapping[str, nn.Parameter]) -> Layout:
    """Return this rank's shards of the prunable weights, with the padding around them zeroed.

    Args:
        engine: what `deepspeed.initialize` returned.
        group: the inner optimizer's first parameter group.
        prunable: the weights that are pruned, by name, in the model's order.

    Raises:
        ValueError: if the group does not hold these weights and nothing else.
    """
    _check_group(low_precision_groups(engine)[0], prunable)
    names = {
        id(parameter): (name, index) for index, (name, parameter) in enumerate(prunable.items())
    }
    flats = _flats_of_first_group(engine, group)
    by_flat: dict[int, list[Shard]] = {id(flat): [] for flat in flats}
    for shard in parameter_shards(engine):
        if id(shard.flat) in by_flat:
            name, index = names[id(shard.parameter)]
            by_flat[id(shard.flat)].append(shard.as_shard(name, index))
    for flat in flats:
        _zero_padding(flat, by_flat[id(flat)])
    replicated = engine.zero_optimization_stage() == 0
    return Layout(flats, [by_flat[id(flat)] for flat in flats], replicated=replicated)


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
class ParameterShard:
    """What this rank holds of one trained parameter: a range of a float32 tensor of the optimizer."""

    parameter: nn.Parameter
    offset: int
    numel: int
    flat: Tensor
    start: int

    def part_of(self, tensor: Tensor) -> Tensor:
        """This shard's range of a tensor that is laid out like `flat`."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)

    def as_shard(self, name: str, index: int) -> Shard:
        """Return it as a shard of the prunable weight `name`, the `index`-th of all."""
        return Shard(
            name=name,
            index=index,
            full_shape=full_shape(self.parameter),
            offset=self.offset,
            numel=self.numel,
            flat=self.flat,
            start=self.start,
        )


def parameter_shards(engine: Any) -> Iterator[ParameterShard]:
    """Give this rank's shards of all trained parameters, group by group."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _whole_parameters(engine)
    return _even_shards(engine) if stage == 3 else _fragments_of_flats(engine)


def _whole_parameters(engine: Any) -> Iterator[ParameterShard]:
    """Stage 0: the optimizer's tensors are the parameters or their float32 copies, in the same order."""
    masters = [group["params"] for group in engine.basic_optimizer.param_groups]
    for parameters, flats in zip(low_precision_groups(engine), masters, strict=True):
        for parameter, flat in zip(parameters, flats, strict=True):
            yield ParameterShard(
                parameter=parameter, offset=0, numel=flat.numel(), flat=flat, start=0
            )


def _fragments_of_flats(engine: Any) -> Iterator[ParameterShard]:
    """ZeRO 1/2 and BF16_Optimizer: one flat partition a group, cut where it comes."""
    groups = engine.basic_optimizer.param_groups
    for parameters, group in zip(low_precision_groups(engine), groups, strict=True):
        (flat,) = group["params"]
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # no part of this parameter is on this rank
            yield ParameterShard(
                parameter=parameter,
                offset=mapping.lp_fragment_address.start,
                numel=mapping.hp_fragment_address.numel,
                flat=flat,
                start=mapping.hp_fragment_address.start,
            )


def _even_shards(engine: Any) -> Iterator[ParameterShard]:
    """ZeRO 3: every parameter is cut evenly over the ranks; the last shards may be padded or empty."""
    optimizer = engine.optimizer
    rank = dist.get_rank(dp_group(engine))
    for parameters in low_precision_groups(engine):
        for parameter in parameters:
            sub_group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = min(rank * size, parameter.ds_numel)
            yield ParameterShard(
                parameter=parameter,
                offset=offset,
                numel=min(parameter.ds_numel - offset, size),
                flat=optimizer.fp32_partitioned_groups_flat[sub_group],
                start=start,
            )


def low_precision_groups(engine: Any) -> list[list[Any]]:
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


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's whole shape; under ZeRO 3 the parameter itself is emptied."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def dp_group(engine: Any) -> Any:
    """The group over which ZeRO shards; stage 0 has no optimizer of its own and shards over none."""
    return getattr(engine.optimizer, "dp_process_group", None) or engine.data_parallel_group


def collective_device(engine: Any) -> torch.device:
    """Where counts must live to be reduced: NCCL takes only device tensors."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else engine.device)
