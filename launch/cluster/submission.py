"""What is submitted as a Ray job: the command, what is shipped with it, and its name."""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster.connect import passed_on
from launch.cluster.jobs import STOP_SECONDS
from launch.cluster.shipping import Shipment
from launch.cluster.stop_grace import stop_grace_of
from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import RunConfig, parse_config, read_config
from pipeline.runs.foreign_code import OPTION
from pipeline.runs.named_files import NamedFile, files_of, named_files
from pipeline.runs.upstream import RUN

if TYPE_CHECKING:
    from pipeline.campaigns.config import CampaignConfig

PREFIX = "mgpp-"
# What a job never needs, whatever .gitignore says; Ray leaves out what .gitignore names.
EXCLUDES = (".git/", ".venv/", "**/__pycache__/", "*.pyc", ".mypy_cache/", ".ruff_cache/")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job to be submitted.

    Attributes:
        name: of the run, and a hash of its settings: what is the same run has the same name.
        entrypoint: the shell command of the job.
        runtime_env: what Ray ships to the cluster.
        stop_grace_s: seconds that it may take to save its steps once it is to stop.
    """

    name: str
    entrypoint: str
    runtime_env: dict[str, Any]
    stop_grace_s: int


def make_submission(
    config: str,
    overrides: Sequence[str],
    *,
    command: str = "run",
    working_dir: str = ".",
    excludes: Sequence[str] = (),
    shared: Sequence[str] = (),
    allow_code: bool = False,
) -> Submission:
    """Check what can be checked from here, and return the job.

    Args:
        config: YAML file within `working_dir`: of a run, or of a campaign where that is the command.
        overrides: `key=value` changes to it.
        command: of mgpp.
        working_dir: the folder that is shipped; the job runs in a copy of it.
        excludes: what of it is not needed, as in .gitignore.
        shared: folders that all nodes have, under the same path.
        allow_code: whether the job may run code from outside of mgpp that the configuration names.

    Raises:
        ConfigError: with every problem found.
    """
    root, file = Path(working_dir).resolve(), Path(config).resolve()
    if not file.is_relative_to(root):
        raise ConfigError([Problem(config, f"must be in the folder that is shipped, {root}")])
    values, problems = read_config(config, overrides)
    if problems:
        raise ConfigError(problems)
    named = _config_files(file, root)
    if command == "run":
        run = _parse_run(values, allow_code)
        storage, name = run.storage, run.name
        named += _named_by(values, run)
    else:
        from pipeline.campaigns.grid import read_campaign

        campaign = read_campaign(str(file), overrides)
        storage, name = campaign.storage, campaign.name
        named += _named_by_runs(campaign, root, allow_code)
    shipment = Shipment(root, [*EXCLUDES, *excludes], shared)
    problems = shipment.name_problems()
    problems += [p for needed in dict.fromkeys(named) if (p := shipment.problem(needed))]
    if problems:
        raise ConfigError(problems)
    if "://" not in storage and not Path(storage).is_absolute():
        raise ConfigError(
            [
                Problem(
                    "storage",
                    got=storage,
                    hint="it would be in the job's temporary folder: give an absolute path that all "
                    "nodes share, or a URL (storage=s3://...)",
                )
            ]
        )
    place = file.relative_to(root).as_posix()
    grace = stop_grace_of(str(file), overrides, campaign=command == "campaign")
    settings = json.dumps([command, values], sort_keys=True, default=str)
    return Submission(
        name=f"{PREFIX}{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}",
        entrypoint=shlex.join(
            ["mgpp", command, *([OPTION] if allow_code else []), place, *overrides]
        ),
        runtime_env={
            "working_dir": str(root),
            "excludes": shipment.excludes,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(grace + STOP_SECONDS), **passed_on()},
        },
        stop_grace_s=grace,
    )


def _config_files(path: Path, root: Path) -> list[NamedFile]:
    """Return a configuration file and those it extends, as what a job needs."""
    paths = [os.path.relpath(file, root) for file in files_of(path)]
    return [NamedFile(key=path, path=path) for path in paths]


def _upstream(values: dict[str, Any]) -> str | None:
    """Return the file of the run that makes the model, if another run does."""
    model = values.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    if not isinstance(path, str) or not path.startswith(RUN):
        return None
    return path.removeprefix(RUN).split()[0]


def _parse_run(values: dict[str, Any], allow_code: bool) -> RunConfig:
    """Return a run's configuration, checked as far as this machine can."""
    if _upstream(values) is None:
        config = parse_config(values, allow_code=allow_code)
    else:
        config = parse_config(
            {**values, "model": {**values["model"], "path": "made-by-another-run"}},
            allow_code=allow_code,
        )
    if config.cluster.address not in (None, "auto"):
        raise ConfigError(
            [
                Problem(
                    "cluster.address",
                    got=config.cluster.address,
                    hint="a job runs on the cluster it was submitted to: leave it out",
                )
            ]
        )
    return config


def _named_by(values: dict[str, Any], run: RunConfig) -> list[NamedFile]:
    """Return what a run's configuration names."""
    upstream = _upstream(values)
    made = [] if upstream is None else [NamedFile(key="model.path", path=upstream)]
    return [*made, *named_files(run)]


def _named_by_runs(campaign: "CampaignConfig", root: Path, allow_code: bool) -> list[NamedFile]:
    """Return the files of a campaign's runs, and what these name."""
    from pipeline.campaigns.grid import campaign_runs

    named = []
    for run in campaign_runs(campaign):
        try:
            values, problems = read_config(run.recipe, run.overrides)
            if problems:
                raise ConfigError(problems)
            named += [
                *_config_files(Path(run.recipe), root),
                *_named_by(values, _parse_run(values, allow_code)),
            ]
        except ConfigError as error:
            raise ConfigError(problem.within(run.title) for problem in error.problems) from error
    return named
