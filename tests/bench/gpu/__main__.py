"""Everything that only a GPU can show, on one device; as plain text, and in gpu.json.

python -m tests.bench.gpu [--dry-run] [--out gpu.json] [layouts kernels pruning ...]

Exit code: 0 if every check passed and every limit is kept, 1 if not, 2 if nothing could be run.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.gpu.figures import Figure, table
from tests.bench.gpu.process import found_in, run_part
from tests.bench.gpu.sizes import DRY_RUN, GPU, Part

_LOG_END = 3000  # characters of what a failed part said that are shown
_PRELOADED = "tests.bench.gpu.parts"
_DEVICE = """
import json, torch
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(json.dumps({"device": p.name, "memory_bytes": p.total_memory, "cuda": torch.version.cuda}))
"""
_DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]


def find_device() -> dict[str, Any] | None:
    """Return what torch and the driver say of the first GPU; None where torch sees none.

    Asked in a process of its own: this one starts others, and must not hold memory of the device.
    """
    done = subprocess.run(
        [sys.executable, "-c", _DEVICE], capture_output=True, text=True, check=False
    )
    if not done.stdout.strip():
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    try:
        said = subprocess.run(_DRIVER, capture_output=True, text=True, check=False)
        found["driver"] = said.stdout.strip() or None
    except OSError:
        found["driver"] = None
    return found


def run(part: Part, device: str, folder: Path) -> tuple[list[Figure], str]:
    """Run a part in a process of its own; return its figures, and why it failed if it did."""
    folder.mkdir()
    # A dry run's parts are forked from a process that has imported what they need; a GPU does not
    # stand forks.
    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    process = context.Process(target=run_part, args=(part, device, folder))
    process.start()
    process.join(part.seconds)
    problem = ""
    if process.is_alive():
        problem = f"ran longer than {part.seconds:g} s"
    elif not (folder / "ended").exists():
        problem = f"ended with code {process.exitcode}"
    _end(process)
    if problem:
        log = folder / "log"
        problem += f"\n{log.read_text(errors='replace')[-_LOG_END:] if log.exists() else ''}"
    return list(found_in(folder)), problem


def _end(process: Any) -> None:
    """End a part with all that it started: it leads a group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def throughput_ratio(figures: list[Figure]) -> list[Figure]:
    """Hold the medians of both ways to train against each other."""
    rates = {
        mode: [float(f.value) for f in figures if f.key.startswith(f"tokens_per_second_{mode}_")]
        for mode in ("ours", "trainer")
    }
    if not all(rates.values()):
        return []
    return [
        Figure(
            key="throughput_ratio",
            text="tokens a second over transformers.Trainer with DeepSpeed",
            value=median(rates["ours"]) / median(rates["trainer"]),
            limit=">= 1",
            of_device=True,
        )
    ]


def main(arguments: list[str]) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("parts", nargs="*", help="; ".join(dict.fromkeys(p.group for p in GPU)))
    given = parser.parse_args(arguments)
    found = None if given.dry_run else find_device()
    if found is None and not given.dry_run:
        print("torch sees no CUDA device; --dry-run tries the same at tiny sizes on the CPU")
        return 2
    parts = DRY_RUN if given.dry_run else GPU
    unknown = set(given.parts) - {part.group for part in parts}
    if unknown:
        print(f"no such parts: {', '.join(sorted(unknown))}")
        return 2
    device = "cpu" if given.dry_run else "cuda"
    os.environ |= {
        "DS_ACCELERATOR": device,
        "HF_HUB_OFFLINE": "1",
        # Parts leave without the interpreter's teardown, and with it locks that nobody waits for.
        "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
    }
    if given.dry_run:
        os.environ |= {"OMP_NUM_THREADS": "1"}
        multiprocessing.set_forkserver_preload([_PRELOADED])
    figures, failed, seconds = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if given.parts and part.group not in given.parts:
                continue
            print(f"{part.name} ...", flush=True)
            begin = time.monotonic()
            of_part, problem = run(part, device, Path(folder) / part.name)
            seconds[part.name] = round(time.monotonic() - begin, 1)
            figures += of_part
            if problem:
                failed[part.name] = problem
                print(f"{part.name} FAILED: {problem}", flush=True)
    figures += throughput_ratio(figures)
    packages = ("torch", "deepspeed", "transformers", "accelerate")
    record = {
        **(found or {"device": f"dry run on {platform.machine()}"}),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "seconds": seconds,
        "failed_parts": failed,
        "figures": [figure.record(given.dry_run) for figure in figures],
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    for figure in figures:
        if figure.value is False:
            print(f"\n{figure.key} FAILED:\n{figure.detail}")
    print(
        "\n"
        + table([("", "", "measured", "limit"), *(f.row(given.dry_run) for f in figures)])
        + "\n"
    )
    broken = [f.key for f in figures if f.is_kept(given.dry_run) is False]
    wrong = [*failed, *broken]
    print(f"not as it must be: {', '.join(wrong)}" if wrong else "all as it must be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
