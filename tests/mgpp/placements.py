"""Where sparsity goes once more, by sorting whole matrices in one process."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from fractions import Fraction

import torch
from torch import Tensor

from mgpp import Placement


def lowest(scores, k, allowed=None):
    """Take the k lowest of several matrices, equals in their order; return what stays."""
    flat = torch.cat([s.reshape(-1) for s in scores]).double()
    if allowed is not None:
        flat[~torch.cat([a.reshape(-1) for a in allowed])] = float("inf")
    stays = torch.ones(flat.numel(), dtype=torch.bool)
    stays[flat.sort(stable=True).indices[:k]] = False
    parts = stays.split([s.numel() for s in scores])
    return [part.view_as(s) for part, s in zip(parts, scores, strict=True)]


def only_lowest(score, num):
    """Mark the lowest of one matrix, as many as its bound lets go."""
    return ~lowest([score], num)[0]


def n_of_m_allowed(score, n, m):
    """Mark in every m columns of each row the m - n lowest, of equals the first."""
    allowed = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for first in range(0, score.shape[1], m):
            group = score[row, first : first + m].tolist()
            for place in sorted(range(m), key=lambda i: (group[i], i))[: m - n]:
                allowed[row, first + place] = True
    return allowed


def block_means(score, rows, columns):
    r, c = score.shape
    blocks = score.double().view(r // rows, rows, c // columns, columns)
    return blocks.mean(dim=(1, 3)).float()


def kept(
    placement: Placement,
    scores: dict[str, Tensor],
    sparsity: float,
    sparsity_of: Callable[[float], float],
) -> dict[str, Tensor]:
    """Return the masks of one pruning.

    Args:
        placement: as the pruner has it.
        scores: by weight; the lowest go.
        sparsity: of all weights now.
        sparsity_of: that of a budget now, by its final one.
    """
    total = sum(score.numel() for score in scores.values())
    rows, columns = 1, 1
    if placement.pattern and "x" in placement.pattern:
        rows, columns = map(int, placement.pattern.split("x"))
    size = rows * columns
    units = scores
    if size > 1:
        units = {name: block_means(score, rows, columns) for name, score in scores.items()}
    allowed = {name: torch.ones_like(unit, dtype=torch.bool) for name, unit in units.items()}
    for name, unit in units.items():
        if placement.pattern and ":" in placement.pattern:
            n, m = map(int, placement.pattern.split(":"))
            allowed[name] &= n_of_m_allowed(unit, n, m)
        cap = int((1 - placement.min_kept) * scores[name].numel() + 1e-9) // size
        allowed[name] &= lowest_allowed(unit, allowed[name], cap)
    left, rest, stays = int(total * sparsity) // size, set(scores), {}
    for pattern, final in placement.budgets.items():
        names = [name for name in scores if fnmatchcase(name, pattern)]
        due = int(sum(scores[name].numel() for name in names) * sparsity_of(final)) // size
        # With one budget: what rounding leaves over, and nothing else can take, or takes too much.
        due = max(due, left - sum(int(allowed[name].sum()) for name in rest - set(names)))
        due = min(due, left)
        stays |= _kept_part(placement.scope, names, due, units, allowed)
        left, rest = left - due, rest - set(names)
    stays |= _kept_part(placement.scope, [n for n in scores if n in rest], left, units, allowed)
    return {
        name: stays[name].repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        for name in scores
    }


def lowest_allowed(score: Tensor, allowed: Tensor, num: int) -> Tensor:
    """Mark the lowest of those that are allowed, as many as may go at most."""
    return ~lowest([score], min(num, int(allowed.sum())), [allowed])[0]


def _kept_part(
    scope: str,
    names: list[str],
    due: int,
    units: dict[str, Tensor],
    allowed: dict[str, Tensor],
) -> dict[str, Tensor]:
    keys = {"global": lambda _: "", "layer": lambda n: n.split(".")[1], "uniform": lambda n: n}
    teams: dict[str, list[str]] = {}
    for name in names:
        teams.setdefault(keys[scope](name), []).append(name)
    sizes = {key: sum(units[n].numel() for n in team) for key, team in teams.items()}
    exact = {key: Fraction(due * size, sum(sizes.values())) for key, size in sizes.items()}
    going = {key: int(share) for key, share in exact.items()}
    most = {key: sum(int(allowed[n].sum()) for n in team) for key, team in teams.items()}
    while sum(going.values()) < due:  # one more for the largest remainder that has room
        open_ = [key for key in exact if going[key] < most[key]]
        key = min(open_, key=lambda key: going[key] - exact[key])
        going[key] += 1
    stays = {}
    for key, team in teams.items():
        scores, marks = [units[n] for n in team], [allowed[n] for n in team]
        stays |= dict(zip(team, lowest(scores, going[key], marks), strict=True))
    return stays
