"""Whether a worker group is to stop: its run's driver asked for it, or a node of it is drained.

The main worker's flag holds for all of them: training agrees on it in a sum that each step has anyway.
The controller may import this file: so nothing heavy is imported here.
"""

import os
import threading
from contextlib import suppress
from typing import Any, Literal

import ray

Reason = Literal["", "stopped", "drained"]
_ASK_SECONDS = 1.0
_DRAIN_SECONDS = 5.0
_OFTEN = (
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"  # how often Ray Train itself looks, of all workers alike
)


class StopFlag:
    """The flag as the main worker sees it.

    Args:
        status: the actor that the driver asks.
        is_main: whether this worker is the main one; the others only join in asking Ray Train.

    Attributes:
        reason: why it is set; empty as long as it is not.
    """

    def __init__(self, status: Any, *, is_main: bool) -> None:
        self.reason: Reason = ""
        self._status = status
        self._is_main = is_main
        self._ended = threading.Event()
        watches = [self._ask_driver] if is_main else []
        if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0":
            watches.append(self._ask_ray)
        for watch in watches:
            threading.Thread(target=watch, name="mgpp-stop", daemon=True).start()

    def is_set(self) -> bool:
        """Return whether this worker says that the group is to stop."""
        return bool(self.reason)

    def close(self) -> None:
        """Look no more."""
        self._ended.set()

    def _ask_driver(self) -> None:
        while not self._ended.is_set():
            with suppress(ray.exceptions.RayError):  # an actor that is lost ends the group, too
                if ray.get(self._status.is_asked_to_stop.remote()):
                    self.reason = "stopped"
                    return
            self._ended.wait(_ASK_SECONDS)

    def _ask_ray(self) -> None:
        """Ask whether a node is drained; each call waits for all workers, so all of them ask."""
        import ray.train

        seconds = float(os.environ.get(_OFTEN, _DRAIN_SECONDS))
        while not self._ended.wait(seconds):
            try:
                if ray.train.get_preemption_info() is None:
                    continue
            except Exception:  # noqa: BLE001  # a worker is lost: the group ends
                return
            if self._is_main:
                self.reason = self.reason or "drained"
            return
