"""A part's process: the only rank of a group, with a log and a session of its own."""

import faulthandler
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from time import perf_counter

from tests.bench.gpu.figures import Figure
from tests.bench.gpu.sizes import Part
from tests.processes import free_port, leave


def run_part(part: Part, device: str, folder: Path) -> None:
    """Measure; write figures to `figures.jsonl` as they are found, and what is printed to `log`."""
    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)
    faulthandler.dump_traceback_later(part.seconds - 2, file=2)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
    }
    import torch

    module = import_module(part.module)
    with (folder / "figures.jsonl").open("a") as found:
        for figure in module.measure(part.size, torch.device(device), folder):
            print(json.dumps(vars(figure)), file=found, flush=True)
    (folder / "ended").touch()
    leave()


def start_group(device: str) -> None:
    """Make the process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that work takes on a device, from when the device has nothing else to do."""
    import torch

    if device != "cuda":
        begin = perf_counter()
        work()
        return perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@contextmanager
def as_on_a_gpu(device: str) -> Iterator[None]:
    """Work on CPU tensors as on those of a GPU, but for the kernels themselves."""
    from mgpp.kernels import devices

    real = devices.has_kernels
    if device != "cuda":
        devices.has_kernels = lambda _: True
    try:
        yield
    finally:
        devices.has_kernels = real


def found_in(folder: Path) -> Iterator[Figure]:
    """Yield the figures that a part has written."""
    path = folder / "figures.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        yield Figure(**json.loads(line))
