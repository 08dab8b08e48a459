"""Trains the tiny BERT on two ranks that are killed again and again, and once in peace.

One process imports all that is slow to import and forks the ranks of each attempt, so that an
attempt takes seconds. The ranks tell it of every step and of every checkpoint they begin to write; it
kills one or both of them at moments drawn from a seed, and starts them again until the run is through.

    python -m tests.pipeline.training.kill_worker BERT DATA OUTPUT CASE WRITING KILLS SEED
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist

from pipeline.section import Duration
from pipeline.store.checkpoints import CheckpointFiles, CheckpointStore, Write
from pipeline.worker_group import WorkerGroup
from tests import slow_imports  # noqa: F401  (once for all attempts)
from tests.pipeline.training.train_worker import PRUNE, TRAIN
from tests.pipeline.training.train_worker import run as train

LENGTH, WARMUP, FINETUNE, EVERY, WORLD = 48, 12, 14, 2, 2
LONGEST_ATTEMPT, _GRACE = 120.0, 2.0  # seconds


@dataclass(frozen=True)
class Kill:
    """When to kill whom: at a step, or in the first checkpoint written from that step on."""

    step: int
    ranks: tuple[int, ...]
    in_checkpoint: bool
    delay: float


def plan_kills(num_kills: int, seed: int) -> list[Kill]:
    """Return kills in order of their steps, as many in each phase: warm-up, gradual, fixed mask."""
    chance = random.Random(seed)
    phases = [(1, WARMUP), (WARMUP, LENGTH - FINETUNE), (LENGTH - FINETUNE, LENGTH - 2)]
    kills = []
    for i in range(num_kills):
        first, last = phases[i % len(phases)]
        kills.append(
            Kill(
                step=chance.randrange(first, last),
                ranks=[(0,), (1,), (0, 1)][i // 3 % 3],
                in_checkpoint=i % 4 == 3,
                delay=chance.uniform(0, 0.03),
            )
        )
    return sorted(kills, key=lambda kill: kill.step)


class Telling(CheckpointStore):
    """Says so when this rank begins to write."""

    tell: Callable[[str, int], None]

    def save(self, write: Write, step: int, *, in_background: bool = False) -> None:
        self.tell("checkpoint", step)
        slowly = partial(write_slowly, write)
        super().save(slowly if in_background else write, step, in_background=in_background)


def write_slowly(write: Write, files: CheckpointFiles) -> None:
    """Write while a step or two are taken, so that many a kill comes between."""
    time.sleep(0.02)
    write(files)
    time.sleep(0.02)


def run_rank(rank: int, meeting: Path, arguments: list[str], output: Path, pipe: int) -> None:
    """Be one rank of an attempt."""
    bert, data, _, case, writing, *_ = arguments

    def tell(kind: str, step: int) -> None:
        os.write(pipe, f"{kind} {step}\n".encode())

    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    workers = WorkerGroup.current()
    notes: list[str] = []
    checkpoints = Telling(f"{output}-checkpoints", workers, notify=notes.append)
    checkpoints.tell = tell
    config = TRAIN.model_copy(
        update={
            "length": Duration(LENGTH),
            "log_every": 1,
            "checkpoint_every": EVERY,
            "checkpoint_writing": writing,
        }
    )
    phases = {"start_after": Duration(WARMUP), "finetune": Duration(FINETUNE)}
    figures = train(
        case,
        Path(bert),
        Path(data),
        output,
        checkpoints,
        config=config,
        prune=PRUNE.model_copy(update=phases),
        progress=lambda record: tell("step", record["step"]) if "step" in record else None,
    )
    if workers.is_main:
        (output / "figures.json").write_text(json.dumps(figures))


def attempt(number: int, arguments: list[str], output: Path, kill: Kill | None) -> bool:
    """Start all ranks and wait for their end; return whether the run is through."""
    meeting = output.parent / f"meeting-{output.name}-{number}"
    reading, writing = os.pipe()
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                run_rank(rank, meeting, arguments, output, writing)
                code = 0
            except BaseException:  # noqa: BLE001  # the fork must not go on as its parent
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    os.close(writing)
    codes = watch(children, reading, kill)
    os.close(reading)
    return all(code == 0 for code in codes)


def watch(children: list[int], reading: int, kill: Kill | None) -> list[int]:
    """Kill when the time has come, and reap; ranks that wait for a dead one are killed too."""
    codes: dict[int, int] = {}
    deadline, told, heard = time.monotonic() + LONGEST_ATTEMPT, b"", True
    while len(codes) < len(children):
        if heard and select.select([reading], [], [], 0.05)[0]:
            chunk = os.read(reading, 65536)
            told, heard = told + chunk, bool(chunk)
        while b"\n" in told:
            line, _, told = told.partition(b"\n")
            kind, step = line.decode().split()
            wanted = "checkpoint" if kill and kill.in_checkpoint else "step"
            if kill and kind == wanted and int(step) >= kill.step:
                time.sleep(kill.delay)
                for rank in kill.ranks:
                    os.kill(children[rank], signal.SIGKILL)
                kill, deadline = None, min(deadline, time.monotonic() + _GRACE)
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = ended[1]
                if ended[1]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            deadline += 5
    return [codes[child] for child in children]


def damage_newest(folder: Path) -> str | None:
    """Flip a byte in the newest complete checkpoint, if another is left; return its name."""
    complete = sorted(path.parent for path in folder.glob("step-*/_DONE.json"))
    if len(complete) < 2:
        return None
    victim = max(complete[-1].glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return complete[-1].name


def main(*arguments: str) -> None:
    """Run once in peace, once with kills."""
    _, _, output, _, _, num_kills, seed = arguments
    values: list[str] = list(arguments)
    peace, torn = Path(output) / "peace", Path(output) / "torn"
    assert attempt(0, values, peace, None)
    log: list[dict[str, Any]] = []
    for number, kill in enumerate(plan_kills(int(num_kills), int(seed))):
        begin = time.monotonic()
        ended = attempt(number, values, torn, kill)
        seconds = round(time.monotonic() - begin, 1)
        log.append({**vars(kill), "survived": ended, "seconds": seconds})
        if number == int(num_kills) // 2:
            log[-1]["damaged"] = damage_newest(Path(f"{torn}-checkpoints"))
    assert attempt(int(num_kills), values, torn, None)
    (Path(output) / "kills.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(*sys.argv[1:])
