"""Ray jobs: submitted to a cluster, followed to their end, listed, stopped."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError, Problem, StageError

if TYPE_CHECKING:
    from launch.cluster.submission import Submission

STOP_SECONDS = 30  # after the grace: for leases on remote storage, and Ray's own end; Ray gives 3 s
_POLL_SECONDS = 1.0
_AGENT_SECONDS = 60.0
_GRACE = "mgpp_stop_grace_s"  # of a job's metadata
_STOPPED = 143
_STATUS: dict[int | None, Literal["done", "stopped", "interrupted"]] = {
    0: "done",
    130: "interrupted",
    _STOPPED: "stopped",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: of its command, in one word.
        exit_code: of its command; 0 only if it succeeded.
        job_status: Ray's word: SUCCEEDED, FAILED, STOPPED.
        message: Ray's, in one line.
    """

    status: Literal["done", "failed", "stopped", "interrupted"]
    exit_code: int
    job_status: str
    message: str


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


def submit(client: Any, submission: "Submission") -> tuple[str, bool]:
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
                metadata={"mgpp": submission.name, _GRACE: str(submission.stop_grace_s)},
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
    job_status, code = str(info.status), info.driver_exit_code
    if job_status == "SUCCEEDED":
        code = 0
    elif job_status == "STOPPED":
        code = code or _STOPPED
    return Outcome(
        status=_STATUS.get(code, "failed"),
        exit_code=1 if code is None else code,
        job_status=job_status,
        message=" ".join((info.message or "").partition(", last available logs")[0].split()),
    )


def grace_of(job: Any) -> float:
    """Return the seconds that a job has to end by itself once it is asked to."""
    return float((job.metadata or {}).get(_GRACE, STOP_SECONDS))


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


def _refused(address: str | None, error: Exception) -> Problem:
    return Problem(
        "--address",
        f"the cluster at {address or 'the default address'} asks for a token and got none or another "
        f"({type(error).__name__})",
        hint="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
    )
