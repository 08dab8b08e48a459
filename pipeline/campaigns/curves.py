"""The training loss of a comparison's cells while their sparsity rose: points, table, plot."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pipeline.campaigns.selection import Cell
from pipeline.reports.series import Records, smoothed

# Of the final sparsity; where the training loss is told.
LEVELS = (0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The training of one cell, a value for each record.

    Attributes:
        steps: of the optimizer, rising.
        losses: the task's loss without what a teacher adds, averaged since the record before.
        sparsities: share of the prunable weights that are zero.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    sparsities: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses averaged over a fortieth of the run."""
        points = smoothed(list(zip(self.steps, self.losses, strict=True)))
        return tuple(loss for _, loss in points if loss is not None)

    def losses_at_levels(self) -> tuple[float, ...]:
        """Return the smoothed loss where the sparsity first reaches each of LEVELS, and at the end."""
        losses, final = self.smoothed, self.sparsities[-1]
        places = [
            next(i for i, sparsity in enumerate(self.sparsities) if sparsity >= level * final)
            for level in LEVELS
        ]
        return tuple(losses[i] for i in (*places, -1))


Curves = Mapping[Cell, LossCurve]


def loss_curve(steps: Records) -> LossCurve:
    """Return a cell's curve from its training records, all of which tell loss and sparsity."""
    return LossCurve(
        steps=tuple(record["step"] for record in steps),
        losses=tuple(record.get("task_loss", record["loss"]) for record in steps),
        sparsities=tuple(record["sparsity"] for record in steps),
    )


def write_points(path: Path, curves: Curves) -> None:
    """Write every point of every curve as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "final_sparsity", "seed", "step", "loss", "sparsity"])
        for cell, curve in curves.items():
            for point in zip(curve.steps, curve.losses, curve.sparsities, strict=True):
                writer.writerow([cell.method, cell.sparsity, cell.seed, *point])


def markdown_losses(curves: Curves) -> str:
    """Return methods by how far the sparsity has risen: the training loss, mean over the seeds."""
    tables = []
    for sparsity in dict.fromkeys(cell.sparsity for cell in curves):
        names = [*(f"{100 * level * sparsity:.3g}% zeros" for level in LEVELS), "end"]
        lines = [f"Training loss on the way to {sparsity:.0%}", ""]
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for method, mine in _by_method(curves, sparsity).items():
            means = map(mean, zip(*(curve.losses_at_levels() for curve in mine), strict=True))
            lines.append(f"| {method} | " + " | ".join(f"{loss:.3f}" for loss in means) + " |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def plot_curves(path: Path, name: str, curves: Curves) -> None:
    """Draw the smoothed loss of each method over its training, a column a sparsity, zeros below."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    sparsities = list(dict.fromkeys(cell.sparsity for cell in curves))
    figure = Figure(figsize=(1.5 + 5.5 * len(sparsities), 5), layout="constrained")
    grid = figure.subplots(2, len(sparsities), squeeze=False, sharex=True, height_ratios=[3, 1])
    for sparsity, top, bottom in zip(sparsities, *grid, strict=True):
        styles = itertools.product(("-", "--", ":", "-."), (f"C{i}" for i in range(10)))
        for (method, mine), (dashes, colour) in zip(
            _by_method(curves, sparsity).items(), itertools.cycle(styles), strict=False
        ):
            look: dict[str, Any] = {
                "color": colour, "linestyle": dashes, "linewidth": 1.2, "alpha": 0.8
            }  # fmt: skip
            for i, curve in enumerate(mine):
                share = [(step + 1) / (curve.steps[-1] + 1) for step in curve.steps]
                top.plot(share, curve.smoothed, label=method if i == 0 else None, **look)
                bottom.plot(share, curve.sparsities, **look)
        top.set_yscale("log")
        top.set_title(f"{name}: on the way to {sparsity:.0%}")
        bottom.set_xlabel("share of the steps")
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("training loss, smoothed")
    grid[1][0].set_ylabel("sparsity")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def _by_method(curves: Curves, sparsity: float) -> dict[str, Sequence[LossCurve]]:
    """Return the curves of a sparsity by method, a curve a seed."""
    return {
        method: [
            c for cell, c in curves.items() if (cell.method, cell.sparsity) == (method, sparsity)
        ]
        for method in dict.fromkeys(cell.method for cell in curves)
    }
