"""Pruning one layer of a decoder in one shot: statistics over all workers, a matrix to each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgpp import OneShotMethod
from mgpp.sharding.bitmask import pack_bits
from mgpp.sharding.stats import positions_hash
from pipeline.errors import StageError
from pipeline.models.decoder import (
    DecoderLayer,
    LayerCall,
    oriented,
    run_layer,
    stored_weight,
    weight_rows,
)
from pipeline.worker_group import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class MatrixFigures:
    """What pruning one matrix came to.

    Attributes:
        num_pruned: weights set to zero.
        threshold: the largest score that was pruned.
        mask_hash: of the matrix's mask in its place among all; hashes add up modulo 2^64.
    """

    num_pruned: int
    threshold: float
    mask_hash: int


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
        sums = layer_statistics(self.method, layer, call, hidden, self.workers.device)
        for name, total in sums.items():
            dist.all_reduce(total)
            _check_statistic(name, total)
        owners = matrix_owners(layer, self.workers.world_size)
        mine: dict[str, MatrixFigures] = {}
        problem = None
        for name, projection in layer.projections.items():
            total = sums.pop(name)  # memory of the device, which the next one needs
            if owners[name] == self.workers.rank and problem is None:
                try:
                    mine[name] = self._prune_matrix(name, projection, total)
                except ValueError as error:
                    problem = f"{name}: {error}"
        problems = [p for p in self.workers.broadcast(self.workers.gather(problem)) if p]
        if problems:
            raise StageError(problems[0])
        for name, projection in layer.projections.items():
            dist.broadcast(stored_weight(projection).view(torch.uint8), src=owners[name])
        return self._shared(list(layer.projections), mine)

    def _prune_matrix(self, name: str, projection: nn.Module, statistic: Tensor) -> MatrixFigures:
        """Prune one matrix in place.

        Raises:
            ValueError: if it cannot be.
        """
        weight = weight_rows(projection)
        found = self.method.prune(weight.float(), statistic, self.counts[name])
        weight.copy_(found.weight)
        if not weight.isfinite().all():
            raise ValueError(
                f"weights are not finite in {weight.dtype}; use zero.precision: bf16 or fp32"
            )
        keep = oriented(found.keep, projection).reshape(-1)
        return MatrixFigures(
            num_pruned=keep.numel() - int(keep.sum()),
            threshold=found.threshold,
            mask_hash=positions_hash(pack_bits(keep), keep.numel(), self.starts[name]),
        )

    def _shared(
        self, names: Sequence[str], mine: dict[str, MatrixFigures]
    ) -> dict[str, MatrixFigures]:
        """Return the figures of all matrices on every worker."""
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
            name: MatrixFigures(num_pruned=counted, mask_hash=hashed, threshold=threshold)
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
) -> dict[str, Tensor]:
    """Run rows through a layer and return the method's statistic of each matrix's inputs, float64.

    Each row's part is computed in float32 and by itself, so that it does not depend on how many workers
    the rows are split among; only the order of the sums does.
    """
    sums, hooks = {}, []
    for name, projection in layer.projections.items():
        width = weight_rows(projection).shape[1]
        shape = method.statistic_shape(width)
        sums[name] = torch.zeros(shape, dtype=torch.float64, device=device)

        def add(_: nn.Module, args: tuple[Any, ...], total: Tensor = sums[name]) -> None:
            inputs: Tensor = args[0]
            total.add_(method.statistic(inputs.reshape(-1, inputs.shape[-1]).float()))

        hooks.append(projection.register_forward_pre_hook(add))
    try:
        for states in hidden if hooks else ():
            run_layer(layer.module, call, states.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def matrix_owners(layer: DecoderLayer, world_size: int) -> dict[str, int]:
    """Deal a layer's matrices out, the costliest first, each to the worker with the least to do."""
    costs = {}
    for name, projection in layer.projections.items():
        num_rows, num_columns = weight_rows(projection).shape
        costs[name] = num_columns**2 * (num_columns + num_rows)
    loads, owners = [0] * world_size, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def _check_statistic(name: str, total: Tensor) -> None:
    finite = bool(total.isfinite().all())
    if finite and bool(total.any()):
        return
    kind = "nothing but zeros" if finite else "values that are not finite"
    raise StageError(
        f"the calibration rows send {kind} into {name}; give more rows (prune.calibration_rows) or leave "
        "it alone (prune.exclude)"
    )
