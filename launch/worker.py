"""One worker's part of a stage.

What is imported here at the top, Ray's controller imports too: so nothing heavy is, and settings cross
as plain values.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train
from ray.train import Checkpoint

# What follows from the settings or the code, not from a machine; a lost peer is a RuntimeError.
_NOT_WORTH_TRYING_AGAIN = (ValueError, TypeError, LookupError, AttributeError, AssertionError)


def work(settings: dict[str, Any]) -> None:
    """Run a stage as one of a gang.

    Args:
        settings: `stage`, `config` and `inputs` as plain values, `storage` (URL), `board` (actor).
    """
    board = settings["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # restarted after a failure that trying again cannot mend

    import torch
    from ray.train.torch import get_device

    from pipeline.artifacts import Artifact, ArtifactStore
    from pipeline.config import RunConfig
    from pipeline.errors import ConfigError, StageError
    from pipeline.gang import Gang
    from pipeline.stages import Stage, run_stage

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Ray shows every worker of a node all of the node's GPUs
    gang = Gang.current()

    def progress(record: dict[str, Any]) -> None:
        if gang.is_main:
            board.post.remote(record)

    try:
        run_stage(
            Stage(**settings["stage"]),
            RunConfig.model_validate(settings["config"]),
            ArtifactStore(settings["storage"]),
            {name: Artifact(**values) for name, values in settings["inputs"].items()},
            gang=gang,
            checkpoints=RayCheckpoints(),
            progress=progress,
        )
    except ConfigError as error:
        ray.get(board.fail.remote("config", error.problems))
        raise
    except (StageError, *_NOT_WORTH_TRYING_AGAIN) as error:
        ray.get(board.fail.remote("stage", f"{type(error).__name__}: {error}"))
        raise


class RayCheckpoints:
    """Every worker's part is reported to Ray Train, which keeps the whole in the run's storage."""

    def save(self, write: Callable[[Path], None], step: int) -> None:
        """Let every worker write its part into a folder of its own, and report it."""
        with tempfile.TemporaryDirectory(prefix="mgpp-checkpoint-") as folder:
            write(Path(folder))
            ray_train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """Give the newest whole checkpoint as a local folder."""
        checkpoint = ray_train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)
