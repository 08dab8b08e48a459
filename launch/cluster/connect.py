"""The Ray cluster of a run: one started here, or one joined; and what it can hold."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import ray
from ray.job_config import JobConfig

from launch.cluster.code_folder import VARIABLE
from launch.cluster.raylet import watched_raylet
from pipeline.errors import ConfigError, Problem, StageError
from pipeline.runs.config import ClusterConfig
from pipeline.runs.hardware import Capacity, Hardware

_CGROUP = Path("/sys/fs/cgroup")


class _NoMore(list[str]):
    """Folders that workers import from before all others: none, for what lies there may have our names.

    Ray adds the working folder and the script's; the code folder comes last instead.
    """

    def extend(self, folders: Iterable[str]) -> None:
        """Add nothing."""


def local_capacity() -> Capacity:
    """Return what a cluster started on this machine would have."""
    import torch

    cpus = len(os.sched_getaffinity(0))
    return Capacity(
        nodes=((float(cpus), float(torch.cuda.device_count())),), memory=(_local_memory(),)
    )


def _local_memory() -> float:
    """Return the bytes of memory that this machine has, or its control group is allowed."""
    import psutil

    total = psutil.virtual_memory().total
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2; of version 1
        with suppress(OSError, ValueError):  # not there; "max"
            total = min(total, int((_CGROUP / limit).read_text()))
    return float(total)


def local_hardware() -> Hardware:
    """Return what a cluster started on this machine would have."""
    return Hardware(capacity=local_capacity(), has_bf16=_local_gpu_has_bf16)


def hardware_of(cluster: ClusterConfig, connect: Callable[[], None]) -> Hardware:
    """Return what a run has: the cluster it joins, or this machine.

    Args:
        cluster: of the run.
        connect: joins it.
    """
    if address_of(cluster) is None:
        return local_hardware()
    connect()
    return Hardware(capacity=cluster_capacity(), has_bf16=_joined_gpus_have_bf16)


def _local_gpu_has_bf16() -> bool:
    """Ask in another process: whoever asks keeps hundreds of megabytes of the GPU."""
    code = f"from {__name__} import _gpu_has_bf16; print(_gpu_has_bf16())"
    done = subprocess.run(  # noqa: S603  # our own code
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise StageError(
            f"the GPU of this machine cannot be asked what it is: {done.stderr[-800:]}"
        )
    return done.stdout.split()[-1] == "True"


def _joined_gpus_have_bf16() -> bool:
    """Ask one GPU of the cluster."""
    return bool(ray.get(ray.remote(num_cpus=0, num_gpus=1)(_gpu_has_bf16).remote()))


def _gpu_has_bf16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def address_of(cluster: ClusterConfig) -> str | None:
    """Return the address of the cluster that a run joins; None where it starts one.

    Raises:
        ConfigError: if it is a dashboard's.
    """
    return joined_address("cluster.address", cluster.address)


def joined_address(key: str, given: str | None) -> str | None:
    """Return the address of a cluster: as given by a setting or option, or RAY_ADDRESS.

    Raises:
        ConfigError: if it is a dashboard's, which takes jobs alone.
    """
    if not given:
        key, given = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")
    if given and given.startswith(("http://", "https://")):
        raise ConfigError(
            [
                Problem(
                    key,
                    "is a dashboard's address",
                    got=given,
                    allowed=("auto", "HOST:6379", "ray://HOST:10001"),
                    hint="a dashboard takes jobs: `mgpp submit` with RAY_API_SERVER_ADDRESS or --address",
                )
            ]
        )
    return given or None


def _job_config(address: str | None) -> JobConfig | None:
    """Return what keeps Ray from putting the working folder first; by its client it does not."""
    if address and address.startswith("ray://"):
        return None
    config = JobConfig()
    config._py_driver_sys_path = _NoMore()
    return config


@contextmanager
def connected(cluster: ClusterConfig, lost: Callable[[str], None] | None = None) -> Iterator[None]:
    """Join the configured cluster, or start one here, for as long as the block runs.

    Args:
        cluster: of the run.
        lost: called by a thread, with what happened, where Ray's process of this node ends.

    Raises:
        ConfigError: if there is no cluster at the address.
        StageError: if none can be started here.
    """
    quiet = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    given = {name: os.environ[name] for name in ("PYTHONPATH", VARIABLE) if name in os.environ}
    environment = {"env_vars": {**given, **passed_on()}}
    address = address_of(cluster)
    # Inside a submitted job the environment is the one it was submitted with.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if address is None:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = (
            "0"  # one machine, which goes as a whole
        )
    settings = {
        "address": address or "local",  # None would join whatever Ray runs on this machine
        "include_dashboard": None if address else False,
        "log_to_driver": False,
        "logging_level": "error",
        # What is started here inherits it: given to Ray, it would start every process twice over.
        "runtime_env": environment if address and not in_job else None,
    }
    try:
        with _own_handlers():
            try:
                ray.init(**settings, job_config=_job_config(address))
            except Exception as error:
                if address or "timed out during startup" not in str(error):
                    raise
                ray.shutdown()
                # The machine was too busy for Ray's own half minute: once more.
                ray.init(**settings, job_config=_job_config(address))
    except Exception as error:  # Ray raises plain ones too
        if address:
            raise ConfigError(
                [Problem("cluster.address", f"cannot join a Ray cluster at {address!r}: {error}")]
            ) from error
        raise StageError(
            f"Ray did not start on this machine: {error} Give the same command again when the machine is "
            "less busy, or start Ray yourself (ray start --head) and set cluster.address: auto"
        ) from error
    try:
        with watched_raylet(lost) if lost else nullcontext():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep this process's handlers of signals: Ray's own for SIGTERM exits without a word."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = before[signal.SIGTERM]
    try:
        yield
    except SystemExit as left:  # what Ray's handler raises while Ray starts
        if left.code != signal.SIGTERM or not callable(own):
            raise
        own(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def connected_on_demand(
    cluster: ClusterConfig, lost: Callable[[str], None] | None = None
) -> Iterator[Callable[[], None]]:
    """Give a function that connects to the run's cluster, the first time it is called.

    Args:
        cluster: of the run.
        lost: as of `connected`.

    Raises:
        ConfigError, StageError: as `connected` does, when it is called.
    """
    with ExitStack() as stack:

        def connect() -> None:
            if not ray.is_initialized():
                stack.enter_context(connected(cluster, lost))

        yield connect


def wait_for_nodes(count: int, timeout: float, address: str | None = None) -> int:
    """Wait until a cluster has so many nodes; return how many there are.

    Args:
        count: how many are waited for.
        timeout: seconds.
        address: of the cluster; RAY_ADDRESS unless given.

    Raises:
        ConfigError: if no address is given, or a dashboard's.
        StageError: if they are not there in time.
    """
    address = joined_address("--address", address)
    if not address:
        raise ConfigError([Problem("--address", "missing, and RAY_ADDRESS is not set")])
    deadline, found = time.monotonic() + timeout, "no cluster"
    while True:
        try:
            ray.init(address, log_to_driver=False, logging_level="error")
        except Exception as error:  # noqa: BLE001  # Ray raises plain ones too
            found = f"no cluster: {' '.join(str(error).split())[:300]}"
        else:
            while True:
                there = sum(1 for node in ray.nodes() if node["Alive"])
                if there >= count or time.monotonic() > deadline:
                    break
                time.sleep(1.0)
            ray.shutdown()
            if there >= count:
                return there
            found = f"{there} nodes"
        if time.monotonic() > deadline:
            raise StageError(f"{count} nodes were not at {address} within {timeout:g} s: {found}")
        time.sleep(1.0)


def cluster_capacity() -> Capacity:
    """Return what the joined cluster has now, node by node, without nodes that are drained.

    Ray knows of a node's memory what was free as it started: its own store of objects and the rest.
    """
    leaving = ray._private.state.state.get_draining_nodes()  # alive still, but nothing starts there
    alive = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    nodes = [node["Resources"] for node in alive]
    known = all("memory" in node for node in nodes)
    memory = (node["memory"] + node.get("object_store_memory", 0.0) for node in nodes if known)
    return Capacity(
        nodes=tuple((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes),
        memory=tuple(memory),
    )


def free_cores() -> int:
    """Return how many cores work on one node can have soon: those free in the cluster, a node's at most.

    At least 1, which work waits for where all are taken.
    """
    largest = max(cpus for cpus, _ in cluster_capacity().nodes)
    return max(int(min(largest, ray.available_resources().get("CPU", 0.0))), 1)


def passed_on() -> dict[str, str]:
    """Return settings of this process that workers need too; no secrets among them."""
    names = (
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_DATASETS_OFFLINE",
        "MGPP_CACHE",
        "MGPP_DEEPSPEED_SHM",
        "TORCH_EXTENSIONS_DIR",
    )
    return {name: os.environ[name] for name in names if name in os.environ}
