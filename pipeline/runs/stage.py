"""What a stage is, and what names its output: one file a stage in `stages/`, in order in `flow`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.context import Context
from pipeline.runs.config import RunConfig
from pipeline.section import Section
from pipeline.store.artifacts import Artifact, make_key

Settings = Callable[[type[Section]], Collection[str]]
"""Which settings of a section count, given the section's class."""


def every(section: type[Section]) -> Collection[str]:
    """Return the settings of a section that its results depend on."""
    return set(section.model_fields) - section.not_in_key


def only(*names: str) -> Settings:
    """Return a choice of the settings with these names."""
    return lambda section: names


@dataclass(frozen=True, kw_only=True)
class StageContext(Context):
    """What a stage is run with.

    Attributes:
        config: of the run.
        params: what the stage's key is made of, defaults included.
        artifacts: of the stages before it, by name.
        parts: folder on this machine for what is finished of unfinished work.
        cores: that a stage without workers may use.
    """

    config: RunConfig
    params: Mapping[str, Any]
    artifacts: Mapping[str, Artifact]
    parts: Path
    cores: int


class Stage(ABC):
    """One step of a run. Its output is named by a key, made of all that the output depends on.

    Attributes:
        name: of the stage, and of the folder of its artifacts.
        version: raised when the code, or a default of the settings, makes something else than before.
        settings: what of the configuration goes into the key: section -> which of its settings.
        on_all_workers: whether it runs on all workers together.
        for_pruned: whether it is left out of a run that does not prune.
        compared: what its models are called where sizes are compared, and the folders they are in.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    settings: ClassVar[Mapping[str, Settings]]
    on_all_workers: ClassVar[bool] = False
    for_pruned: ClassVar[bool] = False
    compared: ClassVar[Mapping[str, str]] = {}

    def is_part_of(self, config: RunConfig) -> bool:
        """Return whether a run has this stage."""
        return True

    def num_cpus(self, config: RunConfig) -> int | str:
        """Return the cores that it uses where it runs alone; `auto`: as many as are free on a node."""
        return 1

    @abstractmethod
    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the names of the stages whose artifacts it reads."""

    @abstractmethod
    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the output to the context's folder and return figures about it."""

    def memory(self, config: RunConfig, artifacts: Mapping[str, Artifact]) -> int:
        """Return the bytes of memory that a stage without workers takes; 0 if it is not counted.

        Args:
            config: of the run.
            artifacts: of the stages before it, by name.
        """
        return 0

    def effective(self, config: RunConfig) -> RunConfig:
        """Return the configuration as this stage applies it."""
        return config

    def content(self, config: RunConfig) -> dict[str, Any]:
        """Return what names content that settings only point at, such as checksums, by section."""
        return {}

    def plan(self, config: RunConfig, inputs: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """Return the key of the output, and what it is made of with defaults, for people to read later.

        A setting at its default is left out of the key, so that keys stay as they are when a setting is
        added. Both are of one look at the content, which may be a function's that costs much to call.

        Args:
            config: of the run.
            inputs: the keys of the artifacts it reads, by stage.
        """
        effective = self.effective(config)
        content = self.content(effective)
        values = self._values(effective, content, complete=False)
        optional = {n for n, spec in RunConfig.model_fields.items() if spec.default is None}
        values = {n: value for n, value in values.items() if value != {} or n in optional}
        key = make_key(self.name, self.version, values, inputs)
        return key, self._values(effective, content, complete=True)

    def _values(
        self, effective: RunConfig, content: Mapping[str, Any], *, complete: bool
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, settings in self.settings.items():
            section = getattr(effective, name)
            if isinstance(section, Section):
                values[name] = section.given(settings(type(section)), defaults=complete)
            elif section is not None:
                values[name] = section
        for name, found in content.items():
            values[name] = values[name] | found if name in values else found
        return values


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage of one run.

    Attributes:
        name: of the stage.
        key: names its output.
        params: what the key is made of, defaults included.
        inputs: the stages whose artifacts it reads.
        on_all_workers: whether it runs on all workers together.
    """

    name: str
    key: str
    params: dict[str, Any]
    inputs: tuple[str, ...]
    on_all_workers: bool


class InputFolders(Mapping[str, Path]):
    """The folders of artifacts on this machine; each is fetched and checked when it is first read."""

    def __init__(self, artifacts: Mapping[str, Artifact]) -> None:
        self._artifacts = artifacts
        self._folders: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._folders:
            self._folders[name] = self._artifacts[name].path
        return self._folders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._artifacts)

    def __len__(self) -> int:
        return len(self._artifacts)


def model_sizes(stages: Collection[Stage], artifacts: Mapping[str, Artifact]) -> dict[str, int]:
    """Return the bytes of each compared model's weights on disk, by its label."""
    sizes = {
        label: artifacts[stage.name].weight_bytes(folder)
        for stage in stages
        if stage.name in artifacts
        for label, folder in stage.compared.items()
    }
    return {label: size for label, size in sizes.items() if size}
