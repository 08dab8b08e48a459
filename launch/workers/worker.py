"""One worker's part of its group's stages.

What is imported here at the top, Ray's controller imports too: so nothing heavy is, and settings cross
as plain values.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import ray

from launch.workers.devices import use_devices

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
    from pipeline.errors import ConfigError, StageError
    from pipeline.runs.config import RunConfig
    from pipeline.runs.flow import run_stage
    from pipeline.runs.stage import PlannedStage
    from pipeline.storage.node_copies import DamagedArtifactError
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
    try:
        store = store_on_this_node(settings["storage"])
        load_operators(config.zero, lambda text: post({"event": "note", "text": text}))
        for stage in stages:
            # What was done before a restart is there; the main worker's word holds for all.
            artifact = workers.broadcast(
                store.find(stage.name, stage.key) if workers.is_main else None
            )
            if artifact is None:
                inputs = {name: artifacts[name] for name in stage.inputs}
                post({"event": "begin", "stage": stage.name})
                made = run_stage(
                    stage, config, store, inputs, workers=workers, progress=post, log=printed
                )
                artifact = workers.broadcast(made)
                gc.collect()  # the engine is full of cycles, and the next stage needs the memory
            artifacts[stage.name] = artifact
    except ConfigError as error:
        ray.get(status.fail.remote("config", error.problems))
        raise
    except DamagedArtifactError as error:
        ray.get(status.fail.remote("damaged", (error.url, error.problems)))
        raise
    except (StageError, *_NOT_WORTH_RETRYING) as error:
        ray.get(status.fail.remote("stage", f"{stage.name}: {type(error).__name__}: {error}"))
        raise


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
