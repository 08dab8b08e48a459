"""How much of a model its prunable weights are, and what was left out."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from mgpp.prunable import full_shapes, layer_matrices, patterns_of

LEAST_SHARE = 0.9  # of the layers' matrices; below, something was probably missed
_LARGE = 0.01  # of all parameters


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What of a model is prunable.

    Attributes:
        num_parameters: elements of all parameters.
        num_prunable: elements of the prunable weights.
        num_in_layers: elements of the matrices of the repeated layers, without what was excluded.
        num_covered: of those, elements that are prunable.
        left_out: elements of matrices that are not prunable, where they are at least a hundredth of the
            model, by name with "*" for the numbers of layers, the largest first; embeddings too.
        include: patterns that take all matrices of the layers; empty where nothing is missing.
    """

    num_parameters: int
    num_prunable: int
    num_in_layers: int
    num_covered: int
    left_out: dict[str, int]
    include: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the layers' matrices that is prunable."""
        return self.num_covered / self.num_in_layers if self.num_in_layers else 1.0

    @property
    def warning(self) -> str | None:
        """What to tell a user whose selection misses much of the layers; None if it does not."""
        if self.share >= LEAST_SHARE:
            return None
        left = ", ".join(f"{name} ({numel:,})" for name, numel in self.left_out.items())
        patterns = ", ".join(f"'{pattern}'" for pattern in self.include)
        return (
            f"only {self.share:.1%} of the weights in the matrices of the layers are prunable, and "
            f"sparsity is a share of these; large matrices left out: {left}; to prune all "
            f"matrices of the layers, set include: [{patterns}]"
        )


def coverage_of(model: nn.Module, prunable: Iterable[str], exclude: Sequence[str] = ()) -> Coverage:
    """Return how much of a model is prunable.

    Args:
        model: the model; on the meta device is enough.
        prunable: names of the prunable weights.
        exclude: patterns of names that were left out on purpose.
    """
    taken = set(prunable)
    numels = {name: math.prod(shape) for name, shape in full_shapes(model).items()}
    matrices = [name for name, shape in full_shapes(model).items() if len(shape) > 1]
    in_layers = [
        name
        for name in layer_matrices(model)
        if name in taken or not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    total = sum(numels.values())
    left: dict[str, int] = {}
    for name in matrices:
        if name not in taken:
            (pattern,) = patterns_of([name])
            left[pattern] = left.get(pattern, 0) + numels[name]
    missing = any(name not in taken for name in in_layers)
    wanted = [name for name in matrices if name in taken or name in set(in_layers)]
    return Coverage(
        num_parameters=total,
        num_prunable=sum(numels[name] for name in taken),
        num_in_layers=sum(numels[name] for name in in_layers),
        num_covered=sum(numels[name] for name in in_layers if name in taken),
        left_out={
            name: numel
            for name, numel in sorted(left.items(), key=lambda item: -item[1])
            if numel >= _LARGE * total
        },
        include=tuple(patterns_of(wanted)) if missing else (),
    )
