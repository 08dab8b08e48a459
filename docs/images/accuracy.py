"""Draws accuracy.svg, the README's picture, from the table of docs/benchmarks.md.

`python docs/images/accuracy.py` from the repository.
"""

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

_ROW = re.compile(r"^\| (?P<name>[\w-]+) \| (?P<values>[^|]*±[^|]*\|[^|]*±[^|]*)\|$", re.MULTILINE)
_LEFT_OUT = "movement"  # at guessing, far below the others


def table(text: str) -> dict[str, list[tuple[float, float]]]:
    """Return mean and spread of accuracy at each sparsity, by method."""
    rows = {}
    for row in _ROW.finditer(text):
        entries = [entry.replace("*", "").split("±") for entry in row["values"].split("|")]
        rows[row["name"]] = [(float(mean), float(spread)) for mean, spread in entries]
    return rows


def main() -> None:
    """Draw a point and its spread for each method and sparsity, the dense model as a line."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mgpp", "font.size": 11})
    rows = table((Path(__file__).parent.parent / "benchmarks.md").read_text(encoding="utf-8"))
    (dense, _), *_ = rows.pop("dense")
    rows = {name: values for name, values in rows.items() if name != _LEFT_OUT}
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.axvline(dense, color="grey", linestyle="--", linewidth=1)
    axes.text(dense, -0.75, f"dense {dense:.2f}", ha="center", va="bottom", color="grey")
    for column, (sparsity, color) in enumerate(
        (("90% zeros", "#2a6fbb"), ("95% zeros", "#d1603d"))
    ):
        means = [values[column][0] for values in rows.values()]
        spreads = [values[column][1] for values in rows.values()]
        heights = [place + 0.18 * (2 * column - 1) for place in range(len(rows))]
        axes.errorbar(means, heights, xerr=spreads, fmt="o", color=color, capsize=3, label=sparsity)
        for mean, height in zip(means, heights, strict=True):
            axes.annotate(
                f"{mean:.2f}",
                (mean, height),
                (0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize="x-small",
                color=color,
            )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.set_xlabel("accuracy, percent; mean and standard deviation over three seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(Path(__file__).with_name("accuracy.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
