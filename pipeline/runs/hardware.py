"""What `auto` comes to on the hardware at hand; what has begun keeps what it came to first."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import ClusterConfig, RunConfig
from pipeline.storage.filesystems import open_storage
from pipeline.storage.records import (
    DamagedRecordError,
    HardwareChoice,
    create_record,
    read_record,
)
from pipeline.store.artifacts import make_key
from pipeline.training.deepspeed import problems_of

AUTO: Final = "auto"
_FOLDER = "auto"
# What of a configuration names its choice: all that is trained, and nothing of where.
_SECTIONS = ("model", "task", "data", "train", "dense", "prune", "distill")


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a cluster can hold.

    Attributes:
        nodes: the cores and GPUs of each node.
        memory: bytes of each node, in the same order; empty where that is not known.
    """

    nodes: tuple[tuple[float, float], ...]
    memory: tuple[float, ...] = ()

    def num_workers(self, cpus: int, gpus: int) -> int:
        """Return how many workers of a size fit at once."""
        return sum(self._fitting(cpus, gpus))

    def placed(self, cluster: ClusterConfig) -> list[tuple[int, float]]:
        """Return how many of a run's workers each node has, with its memory, as Ray places them.

        That is PACK on as few nodes as possible, SPREAD evenly; nodes without workers are left out.

        Args:
            cluster: of a settled run.
        """
        room = self._fitting(cluster.cpus_per_worker, cluster.gpus)
        placed = [0] * len(room)
        order = sorted(range(len(room)), key=lambda node: -room[node])
        for _ in range(min(cluster.num_workers, sum(room))):
            free = [node for node in order if placed[node] < room[node]]
            spread = cluster.placement == "SPREAD"
            placed[min(free, key=lambda node: placed[node]) if spread else free[0]] += 1
        return [(n, memory) for n, memory in zip(placed, self.memory, strict=True) if n]

    def _fitting(self, cpus: int, gpus: int) -> list[int]:
        return [
            int(min(node_cpus // cpus, node_gpus // gpus if gpus else node_cpus // cpus))
            for node_cpus, node_gpus in self.nodes
        ]

    def __str__(self) -> str:
        """The nodes for people: the largest first, equal ones counted."""
        return ", ".join(
            f"{count} of {cpus:g} CPUs and {gpus:g} GPUs"
            for (cpus, gpus), count in sorted(Counter(self.nodes).items(), reverse=True)
        )


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What workers are to be placed on.

    Attributes:
        capacity: cores and GPUs of each node.
        has_bf16: whether its GPUs compute in bf16; asked only where workers have GPUs.
    """

    capacity: Capacity
    has_bf16: Callable[[], bool]


# What is planned for, where nothing is at hand.
WITH_GPUS = Hardware(capacity=Capacity(nodes=((1e9, 1e9),)), has_bf16=lambda: True)
NO_GPUS = Hardware(capacity=Capacity(nodes=()), has_bf16=lambda: False)


def is_settled(config: RunConfig) -> bool:
    """Return whether nothing is left to the hardware."""
    return AUTO not in (config.cluster.gpus_per_worker, config.zero.precision)


def settled(config: RunConfig, hardware: Hardware) -> RunConfig:
    """Return a configuration with what `auto` comes to.

    Workers have a GPU each where all of them can have one. Precision is bf16 on GPUs that compute in it,
    else float32.
    """
    return _with(config, _chosen(config, hardware))


class Choices:
    """What `auto` came to in a store, for each run or campaign.

    Args:
        storage: URL of the store.
        hardware: returns what there is; called only for what has not begun.

    Attributes:
        damaged: files of choices that cannot be read: what they name is chosen again, and written anew.
    """

    def __init__(self, storage: str, hardware: Callable[[], Hardware]) -> None:
        self._filesystem, root = open_storage(storage)
        self._root = root.rstrip("/")
        self._hardware = hardware
        self._new: dict[str, HardwareChoice] = {}
        self._read: dict[str, HardwareChoice] = {}
        self.damaged: dict[str, DamagedRecordError] = {}

    def settle(self, config: RunConfig, campaign: str = "") -> RunConfig:
        """Return a configuration with what `auto` came to when it began, or comes to now.

        Args:
            config: of a run.
            campaign: name of the campaign that it is a run of; its runs of one recipe keep one choice.

        Raises:
            ConfigError: if the settings cannot be had on this hardware.
        """
        if is_settled(config):
            return checked(config)
        key = _key(config, campaign)
        chosen = self._new.get(key) or self._recorded(key)
        if chosen is None:
            chosen = self._new[key] = _chosen(config, self._hardware())
        return checked(_with(config, chosen))

    def has_begun(self, config: RunConfig) -> bool:
        """Return whether a run has begun, so that `auto` is what it came to then."""
        return not is_settled(config) and self._recorded(_key(config)) is not None

    def warnings(self) -> list[str]:
        """Return a line for each choice that could not be read."""
        return [f"{e}; what `auto` comes to is chosen again" for e in self.damaged.values()]

    def record(self) -> None:
        """Write down what was chosen now: from here on it has begun."""
        for key, chosen in self._new.items():
            self._filesystem.makedirs(f"{self._root}/{_FOLDER}", exist_ok=True)
            if key in self.damaged and self._recorded(key) is None:
                with suppress(FileNotFoundError):
                    self._filesystem.rm(self._path(key))
            if not create_record(self._filesystem, self._path(key), chosen) and (
                self._recorded(key) != chosen
            ):
                raise ConfigError(
                    [
                        Problem(
                            "cluster.gpus_per_worker",
                            "another process began the same run on other hardware a moment ago",
                            got=AUTO,
                            hint="give the same command again to join it, or set it and zero.precision",
                        )
                    ]
                )

    def _recorded(self, key: str) -> HardwareChoice | None:
        if key not in self._read:
            try:
                found = read_record(self._filesystem, self._path(key), HardwareChoice)
            except DamagedRecordError as error:
                self.damaged[key] = error
                return None
            if found is None:
                return None
            self._read[key] = found
        return self._read[key]

    def _path(self, key: str) -> str:
        return f"{self._root}/{_FOLDER}/{key}.json"


def checked(config: RunConfig) -> RunConfig:
    """Return a settled configuration.

    Raises:
        ConfigError: if its precision needs GPUs and it has none, or goes with no such ZeRO stage.
    """
    problems = problems_of(config.zero)
    if problems:
        raise ConfigError(problems)
    if config.zero.precision == "tf32" and not config.cluster.gpus:
        raise ConfigError(
            [
                Problem(
                    "zero.precision",
                    "is a mode of NVIDIA GPUs, and the workers have none",
                    got="tf32",
                    hint="use fp32",
                )
            ]
        )
    return config


def described(config: RunConfig) -> str:
    """Return where a settled run computes, in words."""
    cluster = config.cluster
    workers = "1 worker" if cluster.num_workers == 1 else f"{cluster.num_workers} workers"
    cores = "1 CPU core" if cluster.cpus_per_worker == 1 else f"{cluster.cpus_per_worker} CPU cores"
    each = "" if cluster.num_workers == 1 else " each"
    gpu = " and a GPU" if cluster.gpus else ""
    return f"{workers} of {cores}{gpu}{each}, {config.zero.precision}"


def _key(config: RunConfig, campaign: str = "") -> str:
    if campaign:
        return make_key(AUTO, 1, [campaign, config.name], {})
    sections = {name: getattr(config, name) for name in _SECTIONS}
    values = {name: section.given() for name, section in sections.items() if section is not None}
    return make_key(AUTO, 1, values, {})


def _chosen(config: RunConfig, hardware: Hardware) -> HardwareChoice:
    """Return what the settings that may be `auto` come to: those that are given as they are."""
    cluster, gpus, precision = config.cluster, config.cluster.gpus_per_worker, config.zero.precision
    if gpus == AUTO:
        fitting = hardware.capacity.num_workers(cluster.cpus_per_worker, 1)
        gpus = 1 if fitting >= cluster.num_workers else 0
    if precision == AUTO:
        precision = "bf16" if gpus and hardware.has_bf16() else "fp32"
    return HardwareChoice(gpus_per_worker=gpus, precision=precision)


def _with(config: RunConfig, chosen: HardwareChoice) -> RunConfig:
    """Return a configuration with a choice in place of each `auto`."""
    parts = {"cluster": "gpus_per_worker", "zero": "precision"}
    changes = {
        section: getattr(config, section).model_copy(update={name: getattr(chosen, name)})
        for section, name in parts.items()
        if getattr(getattr(config, section), name) == AUTO
    }
    return config.model_copy(update=changes)
