"""Peak memory of a variant: a process of its own loads it and runs it.

Peaks are of the process's resident memory, as Linux counts it (VmHWM), Python and torch included.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LIBRARIES = 1 << 29  # of the second process
# A model in float32, in bfloat16 and in int8, and one more in float32 that is made sparse; beside these,
# in processes of their own, the same two again.
_BYTES_A_WEIGHT = 4 + 2 + 1 + 4 + (4 + 4)
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def bench_memory(num_bytes: int, itemsize: int) -> int:
    """Return the memory that a benchmark of a checkpoint takes, in bytes.

    Args:
        num_bytes: of the weights as they were trained.
        itemsize: bytes of one of these.
    """
    return _LIBRARIES + _BYTES_A_WEIGHT * num_bytes // itemsize


def peak_memory(
    folder: Path, variant: str, *, batch: int, length: int, tokens: Sequence[int], threads: int
) -> dict[str, int]:
    """Return the peaks of a new process, in bytes.

    Args:
        folder: of the checkpoint.
        variant: a key of VARIANTS.
        batch: rows of the passes that it runs.
        length: tokens of each.
        tokens: numbers of tokens that sparse layers are chosen for.
        threads: of torch.

    Returns:
        `idle`: before the model is loaded; `load`: up to when it is; `run`: of forward passes after that.

    Raises:
        RuntimeError: if the process fails, with the last line it wrote.
    """
    work = {"folder": str(folder), "variant": variant, "batch": batch, "length": length}
    given = json.dumps({**work, "tokens": list(tokens), "threads": threads})
    done = subprocess.run(  # noqa: S603  # this interpreter and this module
        [sys.executable, "-P", "-m", "pipeline.benchmarks.memory", given],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(said[-1])
    found: dict[str, int] = json.loads(lines[-1])
    return found


def main(given: str) -> None:
    """Measure in this process, and print the peaks as JSON."""
    import torch
    from transformers.utils import logging

    import mgpp.integrations.transformers  # noqa: F401
    from pipeline.benchmarks.inputs import random_inputs
    from pipeline.benchmarks.variants import VARIANTS

    logging.disable_progress_bar()
    work: dict[str, Any] = json.loads(given)
    torch.set_num_threads(work["threads"])
    peaks = {"idle": _peak()}
    model = VARIANTS[work["variant"]].load(Path(work["folder"]), work["tokens"]).model
    peaks["load"] = _peak()
    _CLEAR.write_text("5")  # the peak begins anew
    inputs = random_inputs(model.config, work["batch"], work["length"])
    with torch.inference_mode():
        for _ in range(2):
            model(**inputs)
    peaks["run"] = _peak()
    sys.stdout.write(json.dumps(peaks) + "\n")


def _peak() -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(found) * 1024


if __name__ == "__main__":
    main(sys.argv[1])
