"""A model that another recipe makes: `model.path: run:FILE` is what the run of that file exported."""

import shlex
from typing import Any

from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import parse_config, read_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, Choices
from pipeline.storage.filesystems import absolute_url
from pipeline.storage.node_copies import DamagedArtifactError
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.locations import ARTIFACT

RUN = "run:"
_RUN_AGAIN = "run that recipe again, which writes the file anew"


def resolve_upstream(
    values: dict[str, Any], above: tuple[str, ...] = (), *, allow_code: bool = False
) -> tuple[dict[str, Any], list[Problem]]:
    """Replace a `model.path` that names another recipe by where that recipe's model is.

    Args:
        values: a configuration as `read_config` returns it. `run:FILE key=value ...` stands for the run
            of FILE with these changes; as all paths, FILE is relative to the working directory.
        above: the references that led to these values.
        allow_code: whether that recipe may name code from outside of mgpp, which its keys may need.

    Returns:
        The values, with a folder or, on remote storage, with `artifact:URL`, which every machine fetches
        for itself; and the problem, if there is one: the file is wrong, or was not run yet.
    """
    model = values.get("model")
    reference = model.get("path") if isinstance(model, dict) else None
    if not isinstance(reference, str) or not reference.startswith(RUN):
        return values, []
    assert isinstance(model, dict)
    try:
        path = _exported_model(reference, above, allow_code)
    except ConfigError as error:
        return values, error.problems
    return {**values, "model": {**model, "path": path}}, []


def _exported_model(reference: str, above: tuple[str, ...], allow_code: bool) -> str:
    """Return where the model lies that the run exported.

    Raises:
        ConfigError: if the file is wrong, leads back to itself, or was not run.
    """
    try:
        command = shlex.split(reference.removeprefix(RUN))
    except ValueError as error:
        raise ConfigError([Problem("model.path", f"{reference!r}: {error}")]) from error
    if not command:
        raise ConfigError([Problem("model.path", f"{reference!r} names no file")])
    if reference in above:
        raise ConfigError([Problem("model.path", f"{reference!r} leads back to itself")])
    try:
        values, problems = read_config(command[0], command[1:])
        if not problems:
            above = (*above, reference)
            values, problems = resolve_upstream(values, above, allow_code=allow_code)
        if problems:
            raise ConfigError(problems)
        config = parse_config(values, allow_code=allow_code)
        # One that has not begun has no model either, whatever `auto` would come to.
        choices = Choices(absolute_url(config.storage), lambda: NO_GPUS)
        stages = plan_stages(choices.settle(config))
        key = next(stage.key for stage in stages if stage.name == "export")
    except ConfigError as error:
        raise ConfigError(p.within(f"model.path: {reference!r}") for p in error.problems) from error
    for damage in choices.damaged.values():
        raise ConfigError([Problem("model.path", f"{reference!r}: {damage}", hint=_RUN_AGAIN)])
    store = ArtifactStore(absolute_url(config.storage))
    exported = store.find("export", key)
    if exported is None:
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    f"{reference!r} was not run yet, or what it is made of has changed since: there is "
                    f"no export-{key} in {store.url}",
                    hint=f"`mgpp run {shlex.join(command)}` first",
                )
            ]
        )
    if not store.is_local:
        return f"{ARTIFACT}{exported.url}/model"
    try:
        return str(exported.path / "model")
    except DamagedArtifactError as error:
        raise ConfigError([Problem("model.path", f"{reference!r} made {error}")]) from error
