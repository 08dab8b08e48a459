"""What pruning costs: ratios from one run, printed as a table and written to bench.json.

python -m tests.bench [threshold step scaling throughput sparse ray corpora]
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.processes import run, torchrun

# key -> (what it is, the most or the least it may be)
LIMITS: dict[str, tuple[str, str]] = {
    "step_overhead": ("step time over plain fine-tuning", "<= 1.03"),
    "peak_memory_ratio": ("peak memory over plain fine-tuning", "<= 1.05"),
    "pruner_bytes_per_weight": ("bytes the pruner holds per weight of the shard", "<= 0.2"),
    "threshold_speedup": ("torch.kthvalue's time over the exact threshold's", ">= 8"),
    "threshold_reads": ("the exact threshold's time over that of one read of the weights", "<= 6"),
    "threshold_extra_mib": ("MiB the threshold takes beyond the weights", "<= 64"),
    "threshold_sent_bytes": ("bytes a rank sends for a threshold", "<= 1048576"),
    "scaling_elements": ("share of the weights a rank touches, times the ranks", "<= 1.01"),
    "throughput_ratio": ("tokens a second over transformers.Trainer with DeepSpeed", ">= 1"),
    "sparse_speedup_90%_1x128": (
        "dense BERT-base's time over the sparse one's, 90% zeros",
        ">= 1.7",
    ),
    "sparse_speedup_95%_1x128": ("the same at 95% zeros", ">= 2.5"),
    "sparse_speedup_90%_8x128": ("8 rows of 128 tokens, 90% zeros", ">= 1.3"),
    "sparse_speedup_95%_8x128": ("8 rows of 128 tokens, 95% zeros", ">= 2"),
    "ray_share": ("wall time of mgpp run over the same stages in a plain loop", "<= 1.3"),
    "corpus_mb_per_minute": (
        "MB of text a minute of processor time through the data stage, two cores",
        ">= 250",
    ),
    "corpus_memory_mib": ("MiB its processes hold beyond imports", "<= 1024"),
    "corpus_same_files": ("1 if a killed and resumed data stage made the same files", ">= 1"),
}
PARTS = ("threshold", "scaling", "step", "throughput", "sparse", "ray", "corpora")
ROUNDS = 4


def within(key: str, value: float) -> bool:
    """Tell whether a figure keeps its limit."""
    sign, limit = LIMITS[key][1].split()
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def measure(part: str, folder: Path) -> dict[str, Any]:
    """Run one part in processes of its own and return its figures."""
    out = folder / f"{part}.json"
    if part == "step":
        figures: dict[str, Any] = {}
        for mode in ("both", "plain", "pruned"):
            torchrun("tests.bench.step", mode, str(out), num_processes=2, timeout=900)
            figures[mode] = json.loads(out.read_text())
        plain, pruned = (figures[mode]["peak_bytes"] for mode in ("plain", "pruned"))
        return {
            **figures["both"],
            "peak_memory_ratio": pruned / plain,
            "pruner_bytes_per_weight": figures["pruned"]["pruner_bytes_per_weight"],
        }
    if part == "throughput":
        return _throughput(folder)
    command = [sys.executable, "-m", f"tests.bench.{part}", str(out)]
    done = run(command, timeout=3600)
    if done.returncode:
        raise SystemExit(done.stderr)
    values: dict[str, Any] = json.loads(out.read_text())
    return values


def _throughput(folder: Path) -> dict[str, Any]:
    """Run both in turn, and hold their medians against each other."""
    from tests.bench.throughput import SMALL, write_model

    write_model(folder, SMALL)
    rates: dict[str, list[float]] = {"ours": [], "trainer": []}
    for _ in range(ROUNDS):
        for mode, found in rates.items():
            out = folder / f"{mode}.json"
            arguments = (mode, str(folder), str(out))
            torchrun("tests.bench.throughput", *arguments, num_processes=2, timeout=600)
            found.append(json.loads(out.read_text()))
    ratio = median(rates["ours"]) / median(rates["trainer"])
    return {"throughput_ratio": ratio, "tokens_per_second": rates}


def main(parts: list[str]) -> int:
    """Measure, print, write; return 1 where a limit is broken."""
    figures: dict[str, Any] = {}
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts or PARTS:
            console.print(f"{part} ...")
            figures |= measure(part, Path(folder))
    Path("bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    table = Table("", "", "measured", "limit")
    broken = 0
    for key, (text, limit) in LIMITS.items():
        if key in figures:
            kept = within(key, figures[key])
            broken += not kept
            shown = f"{figures[key]:,.3f}".rstrip("0").rstrip(".")
            table.add_row(key, text, shown, limit if kept else f"{limit}  BROKEN")
    console.print(table)
    details = {key: value for key, value in figures.items() if key not in LIMITS}
    console.print_json(data=details)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
