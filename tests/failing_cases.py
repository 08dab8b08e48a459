"""Run on ranks: cases that pass, raise and hang, for the tests of `tests.cases`."""

from pathlib import Path

import torch
import torch.distributed as dist

from tests.cases import run_cases


def count(folder: Path, name: str) -> None:
    """Write how many ranks there are, by their own count."""
    ranks = torch.ones(1)
    dist.all_reduce(ranks)
    with (folder / f"{name}.log").open("a") as file:
        file.write(f"{int(ranks)}\n")


def raise_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only rank 1")
    dist.barrier()


def raise_on_both() -> None:
    raise KeyError(f"rank {dist.get_rank()}")


def wait_for_one() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    while True:
        pass


def main(name: str) -> None:
    folder = Path(name)
    dist.init_process_group("gloo")
    cases = {
        "first": lambda: count(folder, "first"),
        "one": raise_on_one,
        "between": lambda: count(folder, "between"),
        "both": raise_on_both,
        "last": lambda: count(folder, "last"),
        "hung": wait_for_one,
        "left": lambda: count(folder, "left"),
    }
    run_cases(folder, cases, seconds=6)
