"""Runs as Ray jobs: submitted to a cluster, followed to their end, listed, stopped."""

import asyncio
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cluster.connect import passed_on
from launch.cluster.shipping import Shipment
from pipeline.errors import ConfigError, Problem, StageError
from pipeline.runs.config import RunConfig, parse_config, read_config
from pipeline.runs.named_files import NamedFile, files_of, named_files
from pipeline.runs.upstream import RUN

if TYPE_CHECKING:
    from pipeline.campaigns.config import CampaignConfig

PREFIX = "mgpp-"
# What a job never needs, whatever .gitignore says; Ray leaves out what .gitignore names.
EXCLUDES = (".git/", ".venv/", "**/__pycache__/", "*.pyc", ".mypy_cache/", ".ruff_cache/")
STOP_SECONDS = 30  # Ray's own 3 s are short for leases on remote storage
_POLL_SECONDS = 1.0
_AGENT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job to be submitted.

    Attributes:
        name: of the run, and a hash of its settings: what is the same run has the same name.
        entrypoint: the shell command of the job.
        runtime_env: what Ray ships to the cluster.
    """

    name: str
    entrypoint: str
    runtime_env: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: Ray's word: SUCCEEDED, FAILED, STOPPED.
        exit_code: of the command; 0 only if it succeeded.
        message: Ray's, for people.
    """

    status: str
    exit_code: int
    message: str


def make_submission(
    config: str,
    overrides: Sequence[str],
    *,
    command: str = "run",
    working_dir: str = ".",
    excludes: Sequence[str] = (),
    shared: Sequence[str] = (),
) -> Submission:
    """Check what can be checked from here, and return the job.

    Args:
        config: YAML file within `working_dir`: of a run, or of a campaign where that is the command.
        overrides: `key=value` changes to it.
        command: of mgpp.
        working_dir: the folder that is shipped; the job runs in a copy of it.
        excludes: what of it is not needed, as in .gitignore.
        shared: folders that all nodes have, under the same path.

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
        run = _parse_run(values)
        storage, name = run.storage, run.name
        named += _named_by(values, run)
    else:
        from pipeline.campaigns.grid import read_campaign

        campaign = read_campaign(str(file), overrides)
        storage, name = campaign.storage, campaign.name
        named += _named_by_runs(campaign, root)
    shipment = Shipment(root, [*EXCLUDES, *excludes], shared)
    problems = [problem for needed in dict.fromkeys(named) if (problem := shipment.problem(needed))]
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
    settings = json.dumps([command, values], sort_keys=True, default=str)
    return Submission(
        name=f"{PREFIX}{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}",
        entrypoint=shlex.join(["mgpp", command, place, *overrides]),
        runtime_env={
            "working_dir": str(root),
            "excludes": shipment.excludes,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **passed_on()},
        },
    )


def connect(address: str | None) -> Any:
    """Return a client of the cluster's job server.

    Args:
        address: of its dashboard, such as http://127.0.0.1:8265; None takes RAY_API_SERVER_ADDRESS,
            RAY_ADDRESS or the cluster of this machine.

    Raises:
        ConfigError: if there is none, or it does not let this client in.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address is not None:
        os.environ["RAY_API_SERVER_ADDRESS"] = (
            address  # to Ray, a variable counts more than what is given
        )
    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, PermissionError) as error:
        raise ConfigError([_refused(address, error)]) from None
    except Exception as error:  # noqa: BLE001  # Ray raises plain ones too
        if "401" in str(error) or "403" in str(error):
            raise ConfigError([_refused(address, error)]) from None
        raise ConfigError(
            [
                Problem(
                    "--address",
                    f"no Ray job server at {address or 'the default address'}: "
                    f"{' '.join(str(error).split())}",
                    hint="give its dashboard's, such as http://127.0.0.1:8265, or set "
                    "RAY_API_SERVER_ADDRESS",
                )
            ]
        ) from None


def submit(client: Any, submission: Submission) -> tuple[str, bool]:
    """Submit a job, unless the same run is under way there already.

    Returns:
        The job's submission id, and whether it was there before.

    Raises:
        StageError: if the cluster does not take it.
    """
    attempts = [
        job for job in client.list_jobs() if (job.submission_id or "").startswith(submission.name)
    ]
    for job in attempts:
        if not job.status.is_terminal():
            return job.submission_id, True
    name = f"{submission.name}-{len(attempts) + 1}"
    deadline = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=name,
                runtime_env=submission.runtime_env,
                metadata={"mgpp": submission.name},
            )
        except RuntimeError as error:
            # A head that was just started answers before it can take jobs.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise StageError(f"{name} was refused: {' '.join(str(error).split())}") from error
            time.sleep(_POLL_SECONDS)
        else:
            return name, False


def follow(client: Any, job: str, write: Callable[[str], None]) -> Outcome:
    """Write a job's log as it grows, until the job ends.

    Raises:
        StageError: if the cluster is no longer there.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            write(lines)

    try:
        asyncio.run(tail())
        return wait(client, job)
    except (RuntimeError, OSError) as error:
        raise StageError(
            f"{job}: the cluster cannot be reached any more: {' '.join(str(error).split())}; "
            f"the job may still be running: mgpp logs {job} --follow"
        ) from error


def wait(client: Any, job: str, timeout: float | None = None) -> Outcome:
    """Wait for a job's end.

    Raises:
        StageError: if it has not ended in time.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        info = client.get_job_info(job)
        if info.status.is_terminal():
            break
        if deadline is not None and time.monotonic() > deadline:
            raise StageError(f"{job} has not ended within {timeout:g} s; it is {info.status}")
        time.sleep(_POLL_SECONDS)
    succeeded = str(info.status) == "SUCCEEDED"
    code = 0 if succeeded else (info.driver_exit_code or 1)
    return Outcome(status=str(info.status), exit_code=code, message=info.message or "")


def find_job(client: Any, job: str) -> Any:
    """Return what the cluster knows of a job.

    Raises:
        ConfigError: if it knows none of that name, naming those it knows.
    """
    known = {found.submission_id: found for found in our_jobs(client)}
    if job not in known:
        raise ConfigError([Problem(job, f"no such job; jobs are {', '.join(known) or 'none'}")])
    return known[job]


def our_jobs(client: Any) -> list[Any]:
    """Return the jobs that mgpp submitted, the oldest first."""
    jobs = [job for job in client.list_jobs() if (job.metadata or {}).get("mgpp")]
    return sorted(jobs, key=lambda job: job.start_time or 0)


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


def _parse_run(values: dict[str, Any]) -> RunConfig:
    """Return a run's configuration, checked as far as this machine can."""
    if _upstream(values) is None:
        config = parse_config(values)
    else:
        config = parse_config(
            {**values, "model": {**values["model"], "path": "made-by-another-run"}}
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


def _named_by_runs(campaign: "CampaignConfig", root: Path) -> list[NamedFile]:
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
                *_named_by(values, _parse_run(values)),
            ]
        except ConfigError as error:
            raise ConfigError(problem.within(run.title) for problem in error.problems) from error
    return named


def _refused(address: str | None, error: Exception) -> Problem:
    return Problem(
        "--address",
        f"the cluster at {address or 'the default address'} asks for a token and got none or another "
        f"({type(error).__name__})",
        hint="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
    )
