"""How sparsity is distributed: how many elements of which weights are pruned, in whole numbers.

Counts are of *units*: elements, or whole blocks. All of them together are floor(N s), N the prunable
weights and s the schedule's sparsity, rounded down to whole blocks.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from math import ceil, prod
from typing import Literal, get_args

from mgpp.masking.matrices import Matrices
from mgpp.masking.threshold import Group
from mgpp.methods.base import Method
from mgpp.pattern import NofM, Pattern, Tiling, parse_pattern, tiling_of
from mgpp.schedule import PruningSchedule
from mgpp.settings import check_number
from mgpp.sharding.shards import num_matrices

Scope = Literal["global", "layer", "uniform", "lamp"]
SCOPES: tuple[str, ...] = get_args(Scope)
_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Settings of how sparsity is distributed.

    Attributes:
        scope: what competes: "global", all weights; "layer", those of one numbered layer; "uniform",
            those of one matrix, every matrix pruned by the same share; "lamp", all weights, by
            their square over the sum of squares of the matrix's weights that are not smaller
            (arXiv 2010.07611).
        budgets: final sparsity of the weights whose names match a shell pattern; what remains of the
            overall sparsity goes to the other weights. Among the weights of a budget `scope` holds too.
        min_kept: share of every matrix that stays, at least.
        pattern: "N:M" (N of every M consecutive inputs stay) or "ROWSxCOLUMNS" (whole blocks are pruned).

    Raises:
        ValueError: naming the setting that is out of range.
    """

    scope: str = "global"
    budgets: Mapping[str, float] = field(default_factory=dict)
    min_kept: float = 0.0
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope: got {self.scope!r}; allowed are {', '.join(SCOPES)}")
        if self.scope == "lamp" and self.pattern is not None:
            raise ValueError(
                f"scope: 'lamp' scores single weights, and pattern is {self.pattern!r}; leave pattern "
                "out, or take scope global, layer or uniform"
            )
        if not isinstance(self.budgets, Mapping) or not all(
            isinstance(name, str) for name in self.budgets
        ):
            raise TypeError(f"budgets: got {self.budgets!r}; give a mapping, pattern: sparsity")
        for name, sparsity in self.budgets.items():
            check_number(f"budgets: {name!r}", sparsity)
            if not 0 <= sparsity < 1:
                raise ValueError(f"budgets: {name!r} must lie in [0, 1), got {sparsity!r}")
        check_number("min_kept", self.min_kept)
        if not 0 <= self.min_kept < 1:
            raise ValueError(f"min_kept: must lie in [0, 1), got {self.min_kept!r}")
        self.parsed_pattern()

    def parsed_pattern(self) -> Pattern | None:
        """Return the pattern, or None for single weights."""
        return None if self.pattern is None else parse_pattern(self.pattern)


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """Weights with a sparsity of their own; that of the rest is what remains."""

    pattern: str
    indices: tuple[int, ...]
    sparsity: float


class Allocation:
    """The counts of every pruning.

    Args:
        placement: the settings.
        full_shapes: shape of each whole prunable weight, by name, in the order of `Shard.index`; one of
            three dimensions is a stack of matrices, each of which counts by itself.
        schedule: how far the whole is pruned, and when.
        transposed: names of the weights stored inputs first (`Conv1D`).

    Attributes:
        matrices: of the weights.
        names: the name of each matrix's weight.
        numels: elements of each matrix.
        tilings: how the pattern lies in each weight; empty without one.
        unit: elements that are pruned together.
        sizes: units of each matrix.
        caps: the most units of each matrix that may be pruned.

    Raises:
        ValueError: for patterns that match nothing or the same weight, weights that the pattern does not
            fit, and sparsities that cannot be reached, with the numbers.
    """

    def __init__(
        self,
        placement: Placement,
        full_shapes: Mapping[str, tuple[int, ...]],
        schedule: PruningSchedule,
        transposed: Collection[str] = (),
    ) -> None:
        self.placement = placement
        self.schedule = schedule
        self.matrices = Matrices(full_shapes)
        names, shapes = tuple(full_shapes), tuple(full_shapes.values())
        self.names = tuple(names[index] for index in self.matrices.weights)
        self.numels = [
            prod(shapes[index]) // num_matrices(shapes[index]) for index in self.matrices.weights
        ]
        self._pattern = pattern = placement.parsed_pattern()
        self.tilings: list[Tiling] = []
        if pattern is not None:
            self.tilings = [
                tiling_of(pattern, name, shape, transposed=name in transposed)
                for name, shape in full_shapes.items()
            ]
        self.unit = 1 if pattern is None else pattern.unit
        self.sizes = [numel // self.unit for numel in self.numels]
        self.caps = [
            min(
                (numel - ceil(Fraction(str(placement.min_kept)) * numel)) // self.unit,
                int(size * (pattern.max_share if pattern else 1)),
            )
            for numel, size in zip(self.numels, self.sizes, strict=True)
        ]
        self._budgets = self._matched()
        given = {index for budget in self._budgets for index in budget.indices}
        self._rest = tuple(i for i in range(len(self.names)) if i not in given)
        self._check_shares()
        # What is due is linear in the same cube, so both ends tell for all steps between.
        for step in (schedule.prune_start, schedule.prune_end):
            self.groups(self.num_pruned(step), step)

    def num_pruned(self, step: int) -> int:
        """Return how many elements are pruned at a step: floor(N s(t)), before rounding to blocks."""
        return self._share(sum(self.numels), self.schedule.sparsity(step))

    def groups(self, num_pruned: int, step: int) -> list[Group]:
        """Return what is cut at a step: weights, and how many of their units are pruned.

        Under the scope "lamp" those are the weights among which a score decides how many go of each.

        Args:
            num_pruned: elements to be pruned of all, rounded down here to whole units.
            step: of the schedule, for the budgets.
        """
        result = []
        for indices, count in self._parts(num_pruned // self.unit, step):
            teams = self._teams(indices)
            counts = apportion(
                count,
                [sum(self.sizes[i] for i in team) for team in teams],
                [sum(self.caps[i] for i in team) for team in teams],
            )
            result += [Group(indices=t, k=k) for t, k in zip(teams, counts, strict=True)]
        return result

    def _share(self, numel: int, sparsity: float) -> int:
        """Return floor(n s); where s is the most that N:M allows, what that is, without rounding."""
        if isinstance(self._pattern, NofM) and sparsity == float(self._pattern.max_share):
            return int(numel * self._pattern.max_share)
        return int(numel * sparsity)

    def _parts(self, num_units: int, step: int) -> list[tuple[tuple[int, ...], int]]:
        """Return the weights of each budget with their units to prune, and the rest with what remains."""
        counts = self._settled(num_units, step)
        remaining = num_units - sum(counts)
        self._check_counts(num_units, counts, remaining, step)
        parts = [(b.indices, count) for b, count in zip(self._budgets, counts, strict=True)]
        return [*parts, (self._rest, remaining)] if self._rest else parts

    def _settled(self, num_units: int, step: int) -> list[int]:
        """Return each budget's units: its exact share rounded down.

        Where the other weights could not take what rounding leaves over, shares are rounded up instead,
        of the first budgets first; where floats rounded up so that too few remain, one less is pruned.
        """
        counts, lost = [], []
        for budget in self._budgets:
            numel = sum(self.numels[i] for i in budget.indices)
            sparsity = self.schedule.sparsity(step, budget.sparsity)
            counts.append(self._share(numel, sparsity) // self.unit)
            lost.append(numel * sparsity - counts[-1] * self.unit)
        remaining = num_units - sum(counts)
        over = remaining - sum(self.caps[i] for i in self._rest)
        if max(over, -remaining) > len(counts):
            return counts  # that is no rounding
        for place, budget in enumerate(self._budgets):
            most = sum(self.caps[i] for i in budget.indices)
            if over > 0 and lost[place] > 0 and counts[place] < most:
                counts[place], over = counts[place] + 1, over - 1
            elif remaining < 0 < counts[place] and lost[place] < 1:
                counts[place], remaining = counts[place] - 1, remaining + 1
        return counts

    def _teams(self, indices: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the weights that compete with each other, by scope."""
        if self.placement.scope in ("global", "lamp"):
            return [tuple(indices)]
        if self.placement.scope == "uniform":
            return [(index,) for index in indices]
        layers: dict[str, list[int]] = {}
        for index in indices:
            layers.setdefault(layer_of(self.names[index]), []).append(index)
        return [tuple(team) for team in layers.values()]

    def _matched(self) -> list[_Budget]:
        taken: dict[int, str] = {}
        budgets = []
        for pattern, sparsity in self.placement.budgets.items():
            indices = tuple(i for i, name in enumerate(self.names) if fnmatchcase(name, pattern))
            if not indices:
                known = list(dict.fromkeys(self.names))
                names = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
                raise ValueError(
                    f"budgets: pattern {pattern!r} matches no prunable weight; there are: {names}"
                )
            for index in indices:
                if index in taken:
                    raise ValueError(
                        f"budgets: patterns {taken[index]!r} and {pattern!r} both match "
                        f"{self.names[index]}; every weight has one budget at most"
                    )
                taken[index] = pattern
            budgets.append(_Budget(pattern=pattern, indices=indices, sparsity=sparsity))
        return budgets

    def _check_shares(self) -> None:
        """Refuse final sparsities that no weight could have, before any counting."""
        limits = [(float(1 - Fraction(str(self.placement.min_kept))), "min_kept")]
        if self._pattern is not None:
            limits.append((float(self._pattern.max_share), "pattern"))
        asked = {"sparsity": self.schedule.final_sparsity}
        asked |= {f"budgets: {b.pattern!r}": b.sparsity for b in self._budgets}
        for limit, key in limits:
            for what, sparsity in asked.items():
                if sparsity > limit:
                    raise ValueError(
                        f"{what}: got {sparsity}, but {key} {getattr(self.placement, key)} allows "
                        f"{limit} at most"
                    )

    def _check_counts(
        self, num_units: int, counts: Sequence[int], remaining: int, step: int
    ) -> None:
        parts = [
            (f"budgets {b.pattern!r}", b.indices, n)
            for b, n in zip(self._budgets, counts, strict=True)
        ]
        parts.append(("the other weights" if parts else "all weights", self._rest, remaining))
        for what, indices, count in parts:
            most = sum(self.caps[i] for i in indices)
            if 0 <= count <= most:
                continue
            ends = {
                self.schedule.prune_start: "at the first pruning",
                self.schedule.prune_end: "at the last pruning",
            }
            when = ends.get(step, f"at step {step}")
            unit = "weights" if self.unit == 1 else f"blocks of {self.unit}"
            given = ", ".join(
                f"{b.pattern!r} {n}" for b, n in zip(self._budgets, counts, strict=True)
            )
            advice = "lower sparsity or min_kept"
            if self._budgets:
                advice = "change sparsity, budgets or min_kept"
            if self._budgets and not self._rest:
                share = (sum(counts) + 0.5) * self.unit / sum(self.numels)
                advice = f"leave weights without a budget, or set sparsity to {share:.9g}"
            budgets = f" (the budgets take {given})" if given else ""
            raise ValueError(
                f"{'budgets' if self._budgets else 'min_kept'}: of {sum(self.sizes)} {unit} {num_units} "
                f"are to be pruned {when}{budgets}, which asks {count} of {what}, where from 0 to "
                f"{most} may be pruned; {advice}"
            )


def apportion(total: int, sizes: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Divide a total in proportion to sizes, in whole numbers that add up to it.

    Each gets its exact share rounded down; what is missing then goes one by one to those with the largest
    remainders (of equals the first), passing over any that is at its cap.

    Args:
        total: at most the sum of the caps.
        sizes: not all zero.
        caps: the most each can have; not below total / sum(sizes) of its size, rounded down.
    """
    whole = sum(sizes)
    counts = [min(size * total // whole, cap) for size, cap in zip(sizes, caps, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * total % whole), i))
    return filled_up(counts, order, caps, total)


def filled_up(
    counts: Sequence[int], order: Sequence[int], caps: Sequence[int], total: int
) -> list[int]:
    """Return counts that add up to `total`: what is missing is added one by one, in order.

    Args:
        counts: not above the caps, and together at most `total`.
        order: their places, first the one that gets one more first; gone through until all is added.
        caps: the most each can have; any that is at its cap is passed over.
        total: at most the sum of the caps.
    """
    result, missing = list(counts), total - sum(counts)
    while missing:
        for i in order:
            if missing and result[i] < caps[i]:
                result[i] += 1
                missing -= 1
    return result


def layer_of(name: str) -> str:
    """Return a weight's layer: its name up to the first number; the whole name where it has none."""
    found = _LAYER.match(name)
    return found[0] if found else name


def check_scope(method: Method | type[Method], placement: Placement) -> None:
    """Check that a method's weights can be compared so.

    Raises:
        ValueError: if they cannot.
    """
    if placement.scope == "lamp" and not method.prunes_by_magnitude():
        raise ValueError(
            f"scope: 'lamp' is defined on magnitudes, and {method.name} prunes by a score of its own; "
            "take scope global, layer or uniform"
        )
