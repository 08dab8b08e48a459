"""Pruning one layer of a decoder in one shot: statistics over all workers, a matrix to each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgpp import OneShotMethod
from mgpp.sharding.bitmask import pack_bits
from mgpp.sharding.stats import positions_hash
from pipeline.errors import StageError
from pipeline.models.decoder import DecoderLayer, LayerCall, run_layer
from pipeline.models.matrices import Matrix, expert_inputs
from pipeline.worker_group import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class MatrixFigures:
    """What pruning one matrix came to.

    Attributes:
        num_pruned: weights set to zero.
        threshold: the largest score that was pruned.
        mask_hash: of the matrix's mask in its place among all; hashes add up modulo 2^64.
        num_tokens: on which it was pruned, over all workers.
        num_inputs: of the matrix.
    """

    num_pruned: int
    threshold: float
    mask_hash: int
    num_tokens: int
    num_inputs: int


@dataclass(frozen=True, kw_only=True)
class LayerPruner:
    """Prunes the layers of one model; every worker has one, and all call it together.

    Attributes:
        method: how.
        workers: all of them.
        counts: how many weights of each matrix go, by name.
        starts: the place of its first weight among all prunable ones, by name.
    """

    method: OneShotMethod
    workers: WorkerGroup
    counts: dict[str, int]
    starts: dict[str, int]

    def prune(
        self, layer: DecoderLayer, call: LayerCall, hidden: Sequence[Tensor]
    ) -> dict[str, MatrixFigures]:
        """Prune the matrices of a layer that is on the device, each on one worker, and share them out.

        Args:
            layer: of the model.
            call: what it is called with, on the device.
            hidden: its inputs for this worker's rows.

        Raises:
            StageError: on every worker, if the inputs of a matrix do not allow its pruning.
        """
        sums, counts = layer_statistics(self.method, layer, call, hidden, self.workers.device)
        counted = self.workers.sum(*counts.values())
        num_tokens = {name: int(n) for name, n in zip(counts, counted, strict=True)}
        for name, total in sums.items():
            dist.all_reduce(total)
            _check_statistic(layer.matrices[name], total, num_tokens[name])
        owners = matrix_owners(layer, self.workers.world_size)
        mine: dict[str, MatrixFigures] = {}
        problem = None
        for name, matrix in layer.matrices.items():
            total = sums.pop(name)  # memory of the device, which the next one needs
            if owners[name] == self.workers.rank and problem is None:
                try:
                    mine[name] = self._prune_matrix(matrix, total, num_tokens[name])
                except ValueError as error:
                    problem = f"{name}: {error}"
        problems = [p for p in self.workers.broadcast(self.workers.gather(problem)) if p]
        if problems:
            raise StageError(problems[0])
        for name, matrix in layer.matrices.items():
            dist.broadcast(matrix.stored().view(torch.uint8), src=owners[name])
        return self._shared(layer, num_tokens, mine)

    def _prune_matrix(self, matrix: Matrix, statistic: Tensor, num_tokens: int) -> MatrixFigures:
        """Prune one matrix in place.

        Raises:
            ValueError: if it cannot be.
        """
        weight = matrix.rows()
        found = self.method.prune(weight.float(), statistic, self.counts[matrix.name])
        weight.copy_(found.weight)
        if not weight.isfinite().all():
            raise ValueError(
                f"weights are not finite in {weight.dtype}; use zero.precision: bf16 or fp32"
            )
        keep = matrix.oriented(found.keep).reshape(-1)
        return MatrixFigures(
            num_pruned=keep.numel() - int(keep.sum()),
            threshold=found.threshold,
            mask_hash=positions_hash(pack_bits(keep), keep.numel(), self.starts[matrix.name]),
            num_tokens=num_tokens,
            num_inputs=weight.shape[1],
        )

    def _shared(
        self, layer: DecoderLayer, num_tokens: dict[str, int], mine: dict[str, MatrixFigures]
    ) -> dict[str, MatrixFigures]:
        """Return the figures of all matrices on every worker."""
        names = list(layer.matrices)
        integers = torch.zeros(len(names), 2, dtype=torch.int64)
        thresholds = torch.zeros(len(names), dtype=torch.float64)
        for i, name in enumerate(names):
            if name in mine:
                integers[i, 0], integers[i, 1] = mine[name].num_pruned, mine[name].mask_hash
                thresholds[i] = mine[name].threshold
        integers, thresholds = integers.to(self.workers.device), thresholds.to(self.workers.device)
        dist.all_reduce(integers)
        dist.all_reduce(thresholds)
        return {
            name: MatrixFigures(
                num_pruned=counted,
                mask_hash=hashed,
                threshold=threshold,
                num_tokens=num_tokens[name],
                num_inputs=layer.matrices[name].rows().shape[1],
            )
            for name, (counted, hashed), threshold in zip(
                names, integers.tolist(), thresholds.tolist(), strict=True
            )
        }


def layer_statistics(
    method: OneShotMethod,
    layer: DecoderLayer,
    call: LayerCall,
    hidden: Sequence[Tensor],
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Run rows through a layer and return the method's statistic of each matrix's inputs, float64.

    Those of an expert are the tokens that are routed to it; how many tokens there were is returned too.
    Each row's part is computed in float32 and by itself, so that it does not depend on how many workers
    the rows are split among; only the order of the sums does.
    """
    sums: dict[str, Tensor] = {}
    num_tokens = dict.fromkeys(layer.matrices, 0)
    by_module: dict[nn.Module, list[Matrix]] = {}
    for name, matrix in layer.matrices.items():
        shape = method.statistic_shape(matrix.rows().shape[1])
        sums[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        by_module.setdefault(matrix.module, []).append(matrix)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for matrix, inputs in _inputs(by_module[module], [*args, *kwargs.values()]):
            sums[matrix.name].add_(method.statistic(inputs.float()))
            num_tokens[matrix.name] += len(inputs)

    hooks = [module.register_forward_pre_hook(add, with_kwargs=True) for module in by_module]
    try:
        for states in hidden if hooks else ():
            run_layer(layer.module, call, states.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return sums, num_tokens


def _inputs(matrices: Sequence[Matrix], args: Sequence[Any]) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield the matrices of a module that is called, with what they multiply: [tokens, in]."""
    hidden: Tensor = args[0].reshape(-1, args[0].shape[-1])
    if matrices[0].expert is None:
        yield matrices[0], hidden
        return
    by_place = {(matrix.expert, matrix.attribute): matrix for matrix in matrices}
    for expert, inputs in expert_inputs(matrices[0].module, hidden, args[1]):
        for attribute, states in inputs.items():
            if (expert, attribute) in by_place and len(states):
                yield by_place[expert, attribute], states


def matrix_owners(layer: DecoderLayer, world_size: int) -> dict[str, int]:
    """Deal a layer's matrices out, the costliest first, each to the worker with the least to do."""
    costs = {}
    for name, matrix in layer.matrices.items():
        num_rows, num_columns = matrix.rows().shape
        costs[name] = num_columns**2 * (num_columns + num_rows)
    loads, owners = [0] * world_size, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def _check_statistic(matrix: Matrix, total: Tensor, num_tokens: int) -> None:
    alone = f"leave it alone (prune.exclude: ['{matrix.weight}'])"
    if matrix.expert is not None:  # a pattern matches names of parameters, which hold all experts
        alone = f"leave all experts of that parameter alone (prune.exclude: ['{matrix.weight}'])"
    if not num_tokens:
        raise StageError(
            f"no token of the calibration rows is routed to {matrix.name}; give more rows "
            f"(prune.calibration_rows) or {alone}"
        )
    finite = bool(total.isfinite().all())
    if finite and bool(total.any()):
        return
    kind = "nothing but zeros" if finite else "values that are not finite"
    raise StageError(
        f"the calibration rows send {kind} into {matrix.name}; give more rows "
        f"(prune.calibration_rows) or {alone}"
    )
