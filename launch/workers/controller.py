"""What the controller of a worker group, a process of Ray Train, needs: backend and reports of restarts.

The controller imports this file and launch/workers/worker.py: so nothing heavy is imported here.
"""

from dataclasses import dataclass
from typing import Any

from ray.train import UserCallback
from ray.train.torch import TorchConfig

from launch.workers.network import use_node_interface
from launch.workers.prefetch import prefetch

_TorchBackend: type = TorchConfig().backend_cls


class _Backend(_TorchBackend):  # type: ignore[misc]
    """Ray Train's, with models and artifacts fetched and the node's own network interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        assert isinstance(backend_config, WorkerGroupConfig)
        if backend_config.models or backend_config.artifacts:
            worker_group.execute(prefetch, backend_config.models, backend_config.artifacts)
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class WorkerGroupConfig(TorchConfig):  # type: ignore[misc]
    """How the workers' process group is made.

    Attributes:
        models: settings of models that every node fetches before, as plain values.
        artifacts: that every node fetches and checks before, as plain values.
    """

    models: tuple[dict[str, Any], ...] = ()
    artifacts: tuple[dict[str, Any], ...] = ()

    @property
    def backend_cls(self) -> type:
        """The backend that workers start by."""
        return _Backend


class Restarts(UserCallback):  # type: ignore[misc]
    """Posts lost workers to the status actor; Ray Train calls it when it restarts them."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Post the first worker's end and how many there were."""
        rank, error = next(iter(worker_exceptions.items()))
        cause = type(getattr(error, "cause", None) or error).__name__
        text = f"rank {rank} of {len(worker_exceptions)} that ended: {last_line(error)}"
        self._status.restart.remote(cause, text)


def last_line(error: BaseException) -> str:
    """Return an error's last line: Ray puts tracebacks before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
