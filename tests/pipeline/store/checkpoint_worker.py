"""Run on two ranks: checkpoints of made-up states go to an S3 server of another process, and to folders.

What is measured is written as `<case>-<rank>.json`.
"""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import torch
import torch.distributed as dist
from s3fs import S3FileSystem

from mgpp.backends.deepspeed import TrainedShard
from pipeline.errors import StageError
from pipeline.storage import checksums, verified, writing
from pipeline.store.checkpoint_manifest import newest_step
from pipeline.store.checkpoints import CheckpointFiles, CheckpointStore
from pipeline.training import checkpoint_shards
from pipeline.training.checkpoint_shards import ShardReader, ShardWriter
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases
from tests.disk import no_large_files

CASES = ("streamed-foreground", "streamed-background", "slow", "failed", "late", "one-at-a-time")
STATE_MIB, LARGE_STATE_MIB = 32, 64  # of a rank
RATE = 20e6  # bytes a second, of each rank
_MIB = 1 << 20


def make_state(rank: int, mib: int) -> list[TrainedShard]:
    """Return shards of 2 MiB, in an order that is not that of their names."""
    generator = torch.Generator().manual_seed(rank)
    return [
        TrainedShard(
            name=f"layer.{i % 5}.weight.{i}",
            offset=rank * 1000,
            numel=_MIB // 4,
            values={
                key: torch.randn(_MIB // 4, generator=generator) for key in ("master", "exp_avg")
            },
            counters={"step": 3.0},
        )
        for i in range(mib // 2)
    ]


def shards_of(state: list[TrainedShard], rank: int) -> ShardWriter:
    writer = ShardWriter(rank)
    writer.add_trained(state)
    return writer


class PeakMemory:
    """Finds by how much this process grows while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = self._peak - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)


@contextmanager
def requests_seen(see: Callable[[str, dict[str, Any]], Any]) -> Iterator[None]:
    """Await `see(method, arguments)` before each request to S3, and let it have the answer's size."""
    call = S3FileSystem._call_s3

    async def seen(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        await see(method, kwargs)
        answer = await call(self, method, *args, **kwargs)
        if method == "get_object":
            await see("got", {"bytes": answer["ContentLength"]})
        return answer

    S3FileSystem._call_s3 = seen
    try:
        yield
    finally:
        S3FileSystem._call_s3 = call


@contextmanager
def small_sizes() -> Iterator[None]:
    """Let parts, files and blocks be small beside the state."""
    changes = (
        (writing, "PART_BYTES", 5 * _MIB),  # the least that S3 takes
        (writing, "STEP_BYTES", _MIB),
        (checkpoint_shards, "_FILE_BYTES", 8 * _MIB),
        (checkpoint_shards, "_FILES_AT_ONCE", 1),
        (checksums, "BLOCK_BYTES", 2 * _MIB),
        (verified, "BLOCK_BYTES", 2 * _MIB),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def stream(in_background: bool, url: str) -> dict[str, Any]:
    """Save to S3 and restore, twice: by the worker that wrote it, then nothing of it is damaged."""
    workers = WorkerGroup.current()
    store = CheckpointStore(url, workers)
    state = make_state(workers.rank, 4 if workers.rank else LARGE_STATE_MIB)
    fetched = 0

    async def count(method: str, arguments: dict[str, Any]) -> None:
        nonlocal fetched
        fetched += arguments["bytes"] if method == "got" else 0

    def load(saved: Any) -> int:
        reader = ShardReader(saved, first=workers.rank)
        for shard in state:
            values, counters = reader.trained(shard.name, shard.offset, shard.numel)
            assert counters == shard.counters
            assert all(torch.equal(values[key], shard.values[key]) for key in shard.values)
        return sum(entry["bytes"] for entry in saved.manifest.files.values())

    store.save(shards_of(state[:1], workers.rank).write, 1)  # connections and threads are there now
    with small_sizes(), no_large_files(), requests_seen(count):
        with PeakMemory() as memory:
            shards = shards_of(state, workers.rank)
            if in_background:
                shards.copy_to_host()
            store.save(shards.write, 2, in_background=in_background)
            store.settle()
        dist.barrier()
        fetched = 0
        size = store.restore(load)
    return {"grown": memory.growth, "fetched": fetched, "size": size, "step": newest_step(url)}


def save_slowly(url: str) -> dict[str, float]:
    """Save in the background to a store that takes 20 MB a second; time what the training waits."""
    workers = WorkerGroup.current()
    store = CheckpointStore(url, workers)
    state = make_state(workers.rank, STATE_MIB)
    free_at = 0.0

    async def throttle(method: str, arguments: dict[str, Any]) -> None:
        nonlocal free_at
        if "Body" in arguments:
            free_at = max(free_at, time.monotonic()) + len(arguments["Body"]) / RATE
            await asyncio.sleep(free_at - time.monotonic())

    store.save(shards_of(state[:1], workers.rank).write, 1)
    dist.barrier()
    stalled, steps = 0.0, 0
    with small_sizes(), requests_seen(throttle):
        begin = time.monotonic()
        shards = shards_of(state, workers.rank)
        shards.copy_to_host()
        store.save(shards.write, 2, in_background=True)
        stalled += time.monotonic() - begin
        while store._thread is not None:  # until this rank's part is written
            time.sleep(0.05)
            at = time.monotonic()
            store.check()
            stalled, steps = stalled + time.monotonic() - at, steps + 1
        written = time.monotonic() - begin
    dist.barrier()
    return {"stalled": stalled, "written": written, "steps": steps, "step": newest_step(url)}


def fail_on_one(url: str) -> dict[str, Any]:
    """Let one rank's disk be full."""
    workers = WorkerGroup.current()
    store = CheckpointStore(url, workers)
    store.save(lambda files: files.put(f"small-{workers.rank}", b"1"), 1)

    def write(files: CheckpointFiles) -> None:
        files.put(f"big-{workers.rank}", bytes(1 << 17))

    found: dict[str, Any] = {}
    try:
        if workers.rank == 1:
            with no_large_files():
                store.save(write, 2, in_background=True)
                while store._thread is not None:
                    time.sleep(0.01)
                    store.check()
        else:
            store.save(write, 2, in_background=True)
            store.settle()
    except StageError as error:
        found["error"] = str(error)
    dist.barrier()
    return {**found, "step": newest_step(url)}


def come_late(url: str) -> dict[str, Any]:
    """Let one rank take longer than the main worker waits."""
    workers = WorkerGroup.current()
    store = CheckpointStore(url, workers, patience=0.3)

    def write(files: CheckpointFiles) -> None:
        time.sleep(1.5 * workers.rank)
        files.put(f"small-{workers.rank}", b"1")

    store.save(write, 1, in_background=True)
    found: dict[str, Any] = {}
    try:
        store.settle()
    except StageError as error:
        found["error"] = str(error)
    dist.barrier()
    return {**found, "step": newest_step(url)}


def save_one_after_the_other(url: str) -> dict[str, Any]:
    """Save six times in the background; note what is in storage whenever something is written."""
    workers = WorkerGroup.current()
    store = CheckpointStore(url, workers, keep=2)
    seen: list[int] = []

    def write(step: int, files: CheckpointFiles) -> None:
        time.sleep(0.05 * workers.rank)
        files.put(f"state-{workers.rank}", bytes([step]))
        seen.append(len(list(Path(url).glob("step-*"))))

    for step in range(1, 7):
        store.save(partial(write, step), step, in_background=True)
        if workers.is_main:
            assert newest_step(url) == (step - 1 or None)
    store.settle()
    dist.barrier()
    return {"most": max(seen), "left": len(list(Path(url).glob("step-*")))}


def main(bucket: str, output: str) -> None:
    dist.init_process_group("gloo")
    folder = Path(output)
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "streamed-foreground": partial(stream, False, f"{bucket}/foreground"),
        "streamed-background": partial(stream, True, f"{bucket}/background"),
        "slow": partial(save_slowly, f"{bucket}/slow"),
        "failed": partial(fail_on_one, str(folder / "failed")),
        "late": partial(come_late, str(folder / "late")),
        "one-at-a-time": partial(save_one_after_the_other, str(folder / "one-at-a-time")),
    }

    def run(case: str) -> None:
        (folder / f"{case}-{dist.get_rank()}.json").write_text(json.dumps(works[case]()))

    run_cases(folder, {case: partial(run, case) for case in CASES}, seconds=60)
