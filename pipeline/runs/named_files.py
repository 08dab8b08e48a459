"""The files and folders that a configuration names: what must be there where it runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runs.config import RunConfig, own_values
from pipeline.store.locations import ARTIFACT

_ELSEWHERE = ("package:", ARTIFACT)  # found on every machine by other means
_MODEL_FILES = (
    "*.safetensors",
    "pytorch_model*.bin",
    "*.gguf",
    "*.json",
    "*.txt",
    "*.model",
    "*.py",
)
_ALL_FILES = ("**/*",)


@dataclass(frozen=True, kw_only=True)
class NamedFile:
    """A file or folder that a configuration names.

    Attributes:
        key: of the configuration.
        path: as given there, relative to the working directory.
        needed: patterns of the files that are needed of a folder.
        on_hub: whether a path at which nothing lies is a name on the hub.
        module: whether it is a module's, which may be installed instead.
    """

    key: str
    path: str
    needed: tuple[str, ...] = ()
    on_hub: bool = False
    module: bool = False


def files_of(path: Path) -> list[Path]:
    """Return a configuration file, which can be read, and those that it extends."""
    found = [path]
    while base := own_values(found[-1]).get("extends"):
        found.append(found[-1].parent / base)
    return found


def named_files(config: RunConfig) -> list[NamedFile]:
    """Return the files and folders of model, teacher and data."""
    found = [_model("model.path", config.model.path)]
    teacher = config.distill.model(config.model) if config.distill else None
    if teacher is not None:
        found.append(_model("distill.teacher", teacher.path))
    found += _of_data("data", config.data)
    return [file for file in found if not file.path.startswith(_ELSEWHERE)]


def _model(key: str, path: str) -> NamedFile:
    return NamedFile(key=key, path=path, needed=_MODEL_FILES, on_hub=True)


def _of_data(key: str, data: Any) -> Iterator[NamedFile]:
    if data.source == "joined":
        for i, part in enumerate(data.parts):
            yield from _of_data(f"{key}.parts.{i}", part)
    elif data.source == "hub":
        yield NamedFile(key=f"{key}.path", path=data.path, needed=_ALL_FILES, on_hub=True)
    elif data.source == "function":
        module = data.function.partition(":")[0].replace(".", "/")
        for path in (f"{module}.py", f"{module}/__init__.py"):
            yield NamedFile(key=f"{key}.function", path=path, module=True)
    else:
        given = {"train": data.train, "validation": data.validation or []}
        given |= {
            f"extra_validation.{name}": paths for name, paths in data.extra_validation.items()
        }
        for name, paths in given.items():
            for path in paths:
                yield NamedFile(key=f"{key}.{name}", path=path)
