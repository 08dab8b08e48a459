"""One worker's part of its group's stages.

What is imported here at the top, Ray's controller imports too: so nothing heavy is, and settings cross
as plain values.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from launch.workers.devices import use_devices
from launch.workers.stop_flag import StopFlag

_LOG_BYTES = 1 << 20
# What follows from the settings or the code, not from a machine; a lost peer is a RuntimeError.
_NOT_WORTH_RETRYING = (ValueError, TypeError, LookupError, AttributeError, AssertionError)


def work(settings: dict[str, Any]) -> None:
    """Run stages one after the other as one worker of a group, without those that are done.

    Args:
        settings: `stages`, `config` and `inputs` as plain values, `storage` (URL), `status` (actor).
    """
    status = settings["status"]
    if ray.get(status.failure.remote()) is not None:
        return  # restarted after a failure that a restart cannot fix

    use_devices(settings["config"]["cluster"]["gpus_per_worker"])

    import torch
    from ray.train.torch import get_device

    from launch.workers.storage import store_on_this_node
    from pipeline.errors import RunStoppedError
    from pipeline.runs.config import RunConfig
    from pipeline.runs.stage import PlannedStage
    from pipeline.store.artifacts import Artifact
    from pipeline.training.deepspeed import load_operators, use_precision
    from pipeline.worker_group import WorkerGroup, set_collective_timeout

    gc.freeze()  # later collections, of which each stage asks for one, pass over what imports made
    config = RunConfig.model_validate(settings["config"])
    if config.cluster.gpus:
        torch.cuda.set_device(get_device())  # Ray shows a worker all of its node's GPUs
    use_precision(config.zero)
    workers = WorkerGroup.current()
    # Ray has made the default group with it; DeepSpeed makes others.
    set_collective_timeout(config.cluster.timeout_seconds)
    artifacts = {name: Artifact(**values) for name, values in settings["inputs"].items()}

    def post(record: dict[str, Any]) -> None:
        if workers.is_main:
            status.post.remote(record)

    stages = [PlannedStage(**values) for values in settings["stages"]]
    stage = stages[0]
    stop = StopFlag(status, is_main=workers.is_main)
    try:
        with _failure_posted(status, stage.name):
            store = store_on_this_node(settings["storage"])
            load_operators(config.zero, lambda text: post({"event": "note", "text": text}))
        for stage in stages:
            with _failure_posted(status, stage.name):
                artifacts[stage.name] = _found_or_made(
                    stage, config, store, artifacts, workers, post, stop
                )
    except RunStoppedError as error:
        # Returned from, not raised: Ray Train would count it as a failure, and start the workers again.
        if workers.is_main:
            ray.get(status.fail.remote(stop.reason, f"{stage.name}: {error}"))
    finally:
        stop.close()


@contextmanager
def _failure_posted(status: Any, stage: str) -> Iterator[None]:
    """Post a failure of the block that a restart cannot fix."""
    from pipeline.errors import ConfigError, StageError
    from pipeline.storage.node_copies import DamagedArtifactError

    try:
        yield
    except ConfigError as error:
        ray.get(status.fail.remote("config", error.problems))
        raise
    except DamagedArtifactError as error:
        ray.get(status.fail.remote("damaged", (error.url, error.problems)))
        raise
    except (StageError, *_NOT_WORTH_RETRYING) as error:
        ray.get(status.fail.remote("stage", f"{stage}: {type(error).__name__}: {error}"))
        raise


def _found_or_made(
    stage: Any,
    config: Any,
    store: Any,
    artifacts: Mapping[str, Any],
    workers: Any,
    post: Callable[[dict[str, Any]], None],
    stop: StopFlag,
) -> Any:
    """Return the output of a stage, made if it is not there.

    Args:
        stage: planned.
        config: of the run.
        store: where its output goes.
        artifacts: by stage.
        workers: of the group.
        post: is called with records for people to watch.
        stop: tells the main worker whether the group is to stop.

    Raises:
        RunStoppedError: if the group is to stop, before the stage or in it.
    """
    from pipeline.errors import RunStoppedError
    from pipeline.runs.flow import run_stage

    # What was done before a restart is there; the main worker's word holds for all.
    found, is_to_stop = workers.broadcast(
        (store.find(stage.name, stage.key), stop.is_set()) if workers.is_main else None
    )
    if found is not None:
        return found
    if is_to_stop:
        raise RunStoppedError("not begun")
    inputs = {name: artifacts[name] for name in stage.inputs}
    post({"event": "begin", "stage": stage.name})
    made = run_stage(
        stage,
        config,
        store,
        inputs,
        workers=workers,
        progress=post,
        log=printed,
        stop=stop.is_set,
    )
    artifact = workers.broadcast(made)
    gc.collect()  # the engine is full of cycles, and the next stage needs the memory
    return artifact


def printed() -> str:
    """Return the end of what this process printed: Ray sends it to files of its session."""
    sys.stdout.flush()
    sys.stderr.flush()
    texts = []
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(path.stat().st_size - _LOG_BYTES, 0))
                texts.append(f"--- {name} ---\n{file.read().decode(errors='replace')}")
    return "\n".join(texts)
