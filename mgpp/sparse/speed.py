"""Whether a sparse linear layer is faster than the dense one, measured on this machine and remembered.

What is measured is kept in `sparse-speeds.json` in the folder MGPP_CACHE, or else ~/.cache/mgpp, for each
processor, version of torch and number of threads.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from mgpp.sparse.linear import SparseLinear

BLOCKS = (16, 32, 64, 128)
_ROUNDS, _FIRST_ROUNDS = 20, 5
_FILE = "sparse-speeds.json"


class SpeedTable:
    """Dense time over sparse time of linear layers, by their shape, sparsity and number of tokens.

    Args:
        file: where measurements are kept; the default is shared by all processes of a user.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or _folder() / _FILE
        self._machine = (
            f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        )

    def speedups(self, weight: Tensor, tokens: Sequence[int]) -> tuple[int, list[float]]:
        """Return the best block and, for each number of tokens, how many times as fast it is.

        Measured with this weight unless one of its shape and sparsity was before.

        Args:
            weight: float32 [out, in] on a CPU.
            tokens: numbers of tokens.
        """
        share = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        kind = f"{weight.shape[0]}x{weight.shape[1]} at {share:.2f}"
        known = self._read().get(self._machine, {}).get(kind, {})
        if not all(str(n) in known for n in tokens):
            block, found = _measured(weight, tokens)
            known = {"block": block} | {str(n): ratio for n, ratio in found.items()}
            self._add(kind, known)
        return int(known["block"]), [known[str(n)] for n in tokens]

    def _read(self) -> dict[str, dict[str, dict[str, float]]]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _add(self, kind: str, known: dict[str, float]) -> None:
        table = self._read()
        table.setdefault(self._machine, {})[kind] = known
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_name(f".sparse-speeds-{uuid.uuid4().hex[:8]}")
        beside.write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")
        beside.replace(self._file)


def _measured(weight: Tensor, tokens: Sequence[int]) -> tuple[int, dict[int, float]]:
    """Return the best block and the speedups with it."""
    bias = torch.zeros(weight.shape[0])
    layers = {block: SparseLinear(weight, bias, block=block) for block in BLOCKS}
    with torch.inference_mode():
        x = torch.randn(max(tokens), weight.shape[1])
        times = _interleaved([partial(s, x) for s in layers.values()], _FIRST_ROUNDS)
        block = min(zip(times, layers, strict=True))[1]
        found = {}
        for n in tokens:
            given = x[:n]
            pair = [partial(linear, given, weight, bias), partial(layers[block], given)]
            before, after = _interleaved(pair, _ROUNDS)
            found[n] = before / after
    return block, found


def interleaved(works: Sequence[Callable[[], object]], rounds: int) -> Iterator[list[float]]:
    """Run works in turn, A B C A B C, after each once untimed, and yield their seconds by round."""
    for work in works:
        work()
    for _ in range(rounds):
        seconds = []
        for work in works:
            since = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - since)
        yield seconds


def _interleaved(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each work, run in turn."""
    return [median(own) for own in zip(*interleaved(works, rounds), strict=True)]


def _folder() -> Path:
    return Path(os.environ.get("MGPP_CACHE") or Path.home() / ".cache" / "mgpp")


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"
