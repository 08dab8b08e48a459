"""Adds finished runs of a store to docs/evidence.csv, and their prunings to docs/evidence-prunings.csv.

    python docs/evidence.py STORE --part scopes --commit COMMIT --command 'mgpp campaign ...'

A metric that is in the table already, by the same command, is passed over.
"""

import argparse
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.tracking.recorder import METRICS_FILE, parse_records

HERE = Path(__file__).parent
RUNS, PRUNINGS = HERE / "evidence.csv", HERE / "evidence-prunings.csv"
PLACE = ("part", "method", "scope", "sparsity", "steps", "batches", "seed")
RUN_COLUMNS = (*PLACE, "metric", "value", "wall_seconds", "commit", "command")
OF_PRUNING = ("threshold", "churn", "revived", "moved_median", "moved_p99", "spike_share")
PRUNING_COLUMNS = (*PLACE, "commit", "step", "pruned", *OF_PRUNING)


def place_of(part: str, trained: Artifact) -> dict[str, Any]:
    """Return where a run stands: what of its settings the table has columns for."""
    prune, train = trained.params.get("prune", {}), trained.params["train"]
    return {
        "part": part,
        "method": prune.get("method", {}).get("name", "dense"),
        "scope": prune.get("scope", "global") if prune else "",
        "sparsity": prune.get("sparsity", 0.0),
        "steps": trained.metrics["num_steps"],
        "batches": "grouped" if train.get("group_by_length") else "drawn",
        "seed": train["seed"],
    }


def rows_of(store: ArtifactStore, part: str, source: dict[str, str]) -> tuple[list[Any], list[Any]]:
    """Return the rows of all finished runs: their metrics, and their prunings."""
    runs, prunings = [], []
    for folder in sorted(Path(store.url).glob("evaluate-*")):
        evaluated = store.find("evaluate", folder.name.removeprefix("evaluate-"))
        if evaluated is None:
            continue
        for label, stage in (("dense", "dense"), ("pruned", "prune")):
            trained = (
                store.find(stage, evaluated.inputs[stage]) if stage in evaluated.inputs else None
            )
            if trained is None or label not in evaluated.metrics:
                continue
            place = place_of(part, trained) | {"commit": source["commit"]}
            runs += [
                {
                    **place,
                    **source,
                    "metric": name,
                    "value": value,
                    "wall_seconds": round(trained.seconds),
                }
                for name, value in evaluated.metrics[label].items()
            ]
            records = parse_records(trained.read_text(METRICS_FILE)).get("prune", [])
            prunings += [
                {
                    **place,
                    "step": record["step"],
                    "pruned": record["sparsity"],
                    **{name: record.get(name) for name in OF_PRUNING},
                }
                for record in records
            ]
    return runs, prunings


def add(
    path: Path, columns: tuple[str, ...], key: tuple[str, ...], rows: Iterable[Mapping[str, Any]]
) -> int:
    """Append those rows whose key the file does not have; return how many."""
    known: set[tuple[str, ...]] = set()
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            known = {tuple(row[name] for name in key) for row in csv.DictReader(file)}
    new = [row for row in rows if tuple(str(row[name]) for name in key) not in known]
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not known:
            writer.writeheader()
        writer.writerows(new)
    return len(new)


def main() -> None:
    """Read the arguments and add what is new."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    for name in ("part", "commit", "command"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--batches", default="grouped", help="add only runs of these batches")
    arguments = parser.parse_args()
    source = {"commit": arguments.commit, "command": arguments.command}
    found = rows_of(ArtifactStore(arguments.store), arguments.part, source)
    runs, prunings = ([r for r in rows if r["batches"] == arguments.batches] for rows in found)
    num_runs = add(RUNS, RUN_COLUMNS, (*PLACE, "metric", "command"), runs)
    num_prunings = add(PRUNINGS, PRUNING_COLUMNS, (*PLACE, "commit", "step"), prunings)
    print(f"{num_runs} metrics and {num_prunings} prunings are new")  # noqa: T201


if __name__ == "__main__":
    main()
