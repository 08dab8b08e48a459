"""How much of a planted structure MGPP and GMP find as samples grow: trials, a table and a figure.

python -m tests.consistency [FOLDER]     (runs/consistency unless given)

A trial that is done is not run again, so the command may be stopped and given once more.
"""

import csv
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.consistency.trial import METHODS, Trial, path_of, run_and_keep

SAMPLES, SEEDS = (8, 16, 32, 64, 128, 512), (0, 1, 2)
TRIALS = [Trial(n=n, method=m, seed=seed) for seed in SEEDS for n in SAMPLES for m in METHODS]
_WHAT = {
    "f1": "F1 of the recovered support",
    "error": "squared error on fresh samples, over variance",
}


def run_all(trials: list[Trial], folder: Path, num_processes: int) -> list[dict[str, Any]]:
    """Run all trials that are not done, each on one thread, and return all results in order."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    missing = [trial for trial in trials if not path_of(trial, folder).exists()]
    console = Console(stderr=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        tasks = {pool.submit(run_and_keep, trial, folder): trial for trial in missing}
        for done, task in enumerate(as_completed(tasks), 1):
            found = task.result()
            console.print(
                f"{done} of {len(missing)}: {found['method']}, n = {found['n']}, seed {found['seed']}: "
                f"F1 {found['f1']:.3f}, error {found['error']:.4f}"
            )
    return [run_and_keep(trial, folder) for trial in trials]


def averages(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over the seeds, one row a method and number of samples."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["n"], result["method"]), []).append(result)
    keys = ("precision", "recall", "f1", "jaccard", "f1_at_start", "error")
    return [
        {"n": n, "method": method, **{key: mean(r[key] for r in group) for key in keys}}
        for (n, method), group in sorted(groups.items())
    ]


def write_figure(results: list[dict[str, Any]], path: Path) -> None:
    """Draw F1 and error by the number of samples: a point a seed, a line through the means."""
    from matplotlib.figure import Figure

    figure, means = Figure(figsize=(11, 4.2), layout="constrained"), averages(results)
    for axes, (key, what) in zip(figure.subplots(1, 2), _WHAT.items(), strict=True):
        for method in METHODS:
            of_means = [(r["n"], r[key]) for r in means if r["method"] == method]
            of_seeds = [(r["n"], r[key]) for r in results if r["method"] == method]
            (line,) = axes.plot(*zip(*of_means, strict=True), label=method.upper())
            axes.plot(*zip(*of_seeds, strict=True), "o", alpha=0.4, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xlabel("samples")
        axes.set_title(what)
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_yscale("log")
    figure.savefig(path, dpi=130)


def main(folder: Path) -> None:
    """Run, tabulate, draw."""
    results = run_all(TRIALS, folder / "trials", num_processes=len(os.sched_getaffinity(0)))
    means = averages(results)
    (folder / "consistency.json").write_text(json.dumps(results, indent=1) + "\n")
    with (folder / "consistency.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    write_figure(results, folder / "consistency.png")
    table = Table("samples", *[f"{m.upper()} {key}" for key in ("F1", "error") for m in METHODS])
    for n in sorted({row["n"] for row in means}):
        rows = {row["method"]: row for row in means if row["n"] == n}
        texts = [f"{rows[m][key]:.3f}" for key in ("f1", "error") for m in METHODS]
        table.add_row(str(n), *texts)
    Console().print(table)
    Console().print(f"F1 at the start: {mean(row['f1_at_start'] for row in means):.3f}; {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/consistency"))
