"""Draws levers.png: what each lever does to the training loss while the sparsity rises.

`mgpp campaign configs/campaigns/levers.yaml`, then `python docs/images/levers.py PATH` with its
curves.csv.
"""

import sys
from pathlib import Path

import pandas
from matplotlib.figure import Figure

METHODS = ("MGPP", "GMP", "PLATON")


def main() -> None:
    """Draw a panel a lever, with the loss of each method and, faint, what it was without the lever."""
    points = pandas.read_csv(sys.argv[1])
    names = points["method"].drop_duplicates()
    levers = list(dict.fromkeys(name.partition(", ")[2] for name in names if ", " in name))
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(2, (len(levers) + 2) // 2, sharex=True, sharey="row")
    losses, below = panels.flat[: len(levers)], panels.flat[len(levers) :]
    for axes, lever in zip(losses, levers, strict=True):
        for method in METHODS:
            (line,) = axes.plot(*curve(points, f"{method}, {lever}"), linewidth=1.3, label=method)
            axes.plot(*curve(points, method), linewidth=0.9, alpha=0.35, color=line.get_color())
        axes.set_title(lever, fontsize="medium")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    for axes in below:
        axes.set_axis_off()
    figure.supxlabel("share of the steps")
    figure.supylabel("training loss, smoothed; faint: without the lever")
    handles, labels = losses[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(METHODS))
    figure.savefig(Path(__file__).with_name("levers.png"), dpi=130)


def curve(points: pandas.DataFrame, method: str) -> tuple[pandas.Series, pandas.Series]:
    """Return the share of the steps and the loss, averaged over a twentieth of the run."""
    mine = points[points["method"] == method]
    smooth = mine["loss"].ewm(span=max(1, len(mine) // 10)).mean()
    return mine["step"] / mine["step"].max(), smooth


if __name__ == "__main__":
    main()
