"""A barrier on the hosts: workers wait there for each other's storage, and all learn what failed.

A collective of NCCL would keep the device busy waiting, and end the process when its timeout is over.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import StageError, error_text, is_storage_failure
from pipeline.worker_group import WorkerGroup, collective_timeout

BEAT_SECONDS = 5.0
_LONGEST_POLL = 0.05
_DONE, _FAILED, _FINAL = 0, 1, 2


class Agreement:
    """The workers of a group, who do something at the same time and wait for each other.

    Args:
        workers: all of them.
        beat: called every few seconds while this worker waits.
    """

    def __init__(self, workers: WorkerGroup, beat: Callable[[], None]) -> None:
        self._workers = workers
        self._beat = beat
        self._limit = collective_timeout()
        self._group: Any = None

    def __enter__(self) -> "Agreement":
        if self._workers.world_size > 1:
            # Its own timeout comes after ours, which says more.
            limit = timedelta(seconds=2 * self._limit)
            self._group = dist.new_group(backend="gloo", timeout=limit)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._group is not None and kind is None:  # others may be in it still
            dist.destroy_process_group(self._group)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Run the block on all workers, then wait for the others.

        Args:
            what: the block does, for errors ("write the model").

        Raises:
            StageError: on all workers, if storage is full or not writable on any.
            TimeoutError: if a worker does not come for `cluster.timeout_seconds`.
            Exception: what the block raised here.
            RuntimeError: if it raised anything on another worker.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001  # all must come to the barrier
            failure = error
        final = failure is not None and (
            isinstance(failure, StageError) or is_storage_failure(failure)
        )
        codes = self._gather(_FINAL if final else _FAILED if failure else _DONE, what)
        if not any(codes):
            return
        code = max(codes)
        mine = error_text(failure) if failure else None
        texts = [mine] * len(codes)
        if self._group is not None:
            dist.all_gather_object(texts, mine, group=self._group)
        rank = codes.index(code)
        text = f"worker {rank} could not {what}: {texts[rank]}"
        if code == _FINAL:
            raise StageError(text) from failure
        if failure is not None:
            raise failure
        raise RuntimeError(text)

    def _gather(self, code: int, what: str) -> list[int]:
        """Return all workers' codes."""
        if self._group is None:
            return [code]
        mine = torch.tensor([code], dtype=torch.int64)
        codes = [torch.zeros_like(mine) for _ in range(self._workers.world_size)]
        self._wait(dist.all_gather(codes, mine, group=self._group, async_op=True), what)
        return [int(one) for one in codes]

    def _wait(self, work: Any, what: str) -> None:
        began = beaten = time.monotonic()
        poll = 0.0005
        while not work.is_completed():
            time.sleep(poll)
            poll = min(2 * poll, _LONGEST_POLL)
            now = time.monotonic()
            if now - beaten > BEAT_SECONDS:
                beaten = now
                self._beat()
            if now - began > self._limit:
                raise TimeoutError(
                    f"a worker did not {what} within cluster.timeout_seconds ({self._limit:g} s)"
                )
        work.wait()  # raises if a worker is lost
