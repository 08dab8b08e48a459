"""The Ray cluster of a run: one started here, or one joined; and what it can hold."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, StageError
from pipeline.validate import Capacity


def local_capacity() -> Capacity:
    """Return what a cluster started on this machine would have."""
    import torch

    cpus = len(os.sched_getaffinity(0))
    return Capacity(nodes=((float(cpus), float(torch.cuda.device_count())),))


def joins(cluster: ClusterConfig) -> bool:
    """Tell whether a run joins a cluster, rather than starting one."""
    return bool(cluster.address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Join the configured cluster, or start one here, for as long as the block runs.

    Raises:
        ConfigError: if there is no cluster at the address.
        StageError: if none can be started here.
    """
    quiet = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    # Functions that a configuration names may lie in the folder the command was given in.
    path = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"env_vars": {"PYTHONPATH": path, **_passed_on()}}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    # Inside a submitted job the environment is the one it was submitted with.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    try:
        ray.init(
            address=address or "local",  # None would join whatever Ray runs on this machine
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="error",
            runtime_env=None if in_job else environment,
        )
    except Exception as error:  # Ray raises plain ones too
        if address:
            raise ConfigError(
                [f"cluster.address: cannot join a Ray cluster at {address!r}: {error}"]
            ) from error
        raise StageError(
            f"Ray did not start on this machine: {error} Give the same command again when the machine is "
            "less busy, or start Ray yourself (ray start --head) and set cluster.address: auto"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def cluster_capacity() -> Capacity:
    """Return what the joined cluster has now, node by node."""
    return Capacity(
        nodes=tuple(
            (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in ray.nodes()
            if node["Alive"]
        )
    )


def _passed_on() -> dict[str, str]:
    """Settings of this process that workers need too; no secrets among them."""
    names = (
        "HF_HUB_OFFLINE",
        "HF_HOME",
        "HF_DATASETS_OFFLINE",
        "MGPP_DEEPSPEED_SHM",
        "DS_ACCELERATOR",
    )
    return {name: os.environ[name] for name in names if name in os.environ}
