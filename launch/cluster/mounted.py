"""What Kubernetes mounts into pods: a run's or campaign's file, and all files that it names in turn."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import own_values, read_config
from pipeline.runs.upstream import RUN

FOLDER = "/etc/mgpp"
MAIN = "run.yaml"
MAIN_FILE = f"{FOLDER}/{MAIN}"
_LONGEST_NAME = 200  # Kubernetes takes 253 characters
_MOST_BYTES = 1_000_000  # Kubernetes takes 1 MiB
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def mounted_files(
    config: str, values: dict[str, Any], *, command: str, storage: str
) -> dict[str, str]:
    """Return the files of a ConfigMap by name; what they name by path, they name by where it is mounted.

    That is the configuration itself, in a campaign the recipes of its tasks, the files that these extend,
    and the recipes whose models they start from (`run:FILE`), which keep their artifacts in the same
    storage unless they name one that pods share.

    Args:
        config: path of the file.
        values: what it holds, with overrides.
        command: of mgpp: "run" or "campaign".
        storage: of the run or campaign.

    Raises:
        ConfigError: if a file is not there, or they are too large together.
    """
    files = _Files(storage)
    main = files.rewritten(values)
    if command == "campaign":
        folder = Path(config).parent
        for named in (main, *(main.get("tasks") or {}).values()):
            if named.get("recipe") is not None:
                named["recipe"] = files.add(folder / named["recipe"])
    texts = {MAIN: _text(config, main), **files.texts}
    size = sum(len(text.encode()) for text in texts.values())
    if size > _MOST_BYTES:
        why = f"it and the {len(texts) - 1} files that it names are more than a ConfigMap holds"
        raise ConfigError([Problem(config, f"{why}, {_MOST_BYTES} bytes", got=size)])
    return texts


class _Files:
    """Files that others name.

    Attributes:
        texts: what each holds, by its name in the ConfigMap.
    """

    def __init__(self, storage: str) -> None:
        self.texts: dict[str, str] = {}
        self._storage = storage
        self._names: dict[Path, str] = {}

    def add(self, path: Path, *, upstream: bool = False) -> str:
        """Add a file, and those that it extends or starts from; return where it is mounted."""
        place = path.resolve()
        if place not in self._names:
            name = self._names[place] = self._unused(path)
            values = self.rewritten(_read(path))
            if values.get("extends") is not None:
                values["extends"] = self.add(path.parent / values["extends"])
            if upstream and not _is_shared(_storage_of(path)):
                values["storage"] = self._storage
            self.texts[name] = _text(str(path), values)
        return f"{FOLDER}/{self._names[place]}"

    def rewritten(self, values: Any) -> Any:
        """Return values in which each `run:FILE` names the file by where it is mounted."""
        if isinstance(values, dict):
            return {key: self.rewritten(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.rewritten(value) for value in values]
        if not isinstance(values, str) or not values.startswith(RUN):
            return values
        try:
            file, *overrides = shlex.split(values.removeprefix(RUN))
        except ValueError as error:
            raise ConfigError([Problem(repr(values), str(error) or "names no file")]) from error
        return RUN + shlex.join([self.add(Path(file), upstream=True), *overrides])

    def _unused(self, path: Path) -> str:
        """Return a name that a ConfigMap takes and no other file has."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.relpath(path))
        plain = plain[-_LONGEST_NAME:].strip(".-") or "file"
        taken = {MAIN, *self._names.values()}
        names = (plain, *(f"{i}-{plain}" for i in range(len(taken))))
        return next(name for name in names if name not in taken)


def token_problems(config: str, files: dict[str, str]) -> list[Problem]:
    """Return which files would hold a token of this machine's environment.

    Args:
        config: what they were made of.
        files: what is to be written, by name.
    """
    return [
        Problem(
            config,
            f"it would write the token in {name} to {file}",
            hint="leave it out: nodes get it by a secret or from their environment",
        )
        for name in _TOKENS
        for file, text in files.items()
        if (token := os.environ.get(name, "").strip()) and token in text
    ]


def _read(path: Path) -> dict[str, Any]:
    """Return what a file holds by itself, references to other values as they are."""
    named = Path(os.path.relpath(path))
    if not named.is_file():
        raise ConfigError([Problem(str(named), "no such file")])
    values = OmegaConf.to_container(own_values(named), resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _storage_of(path: Path) -> str:
    values, problems = read_config(str(path))
    if problems:
        raise ConfigError(problems)
    return str(values.get("storage", "runs"))


def _is_shared(storage: str) -> bool:
    return "://" in storage or Path(storage).is_absolute()


def _text(path: str, values: dict[str, Any]) -> str:
    """Return values as YAML, read again and compared."""
    text = str(OmegaConf.to_yaml(OmegaConf.create(values)))
    if OmegaConf.to_container(OmegaConf.create(text), resolve=False) != values:
        raise ConfigError([Problem(path, "holds values that YAML gives back as others")])
    return text
