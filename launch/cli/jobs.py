"""The commands of jobs on a cluster: `mgpp submit`, `jobs`, `logs`, `stop`."""

import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from launch.cli.ends import End, Ending, reported_errors
from launch.cli.output import (
    AllowCode,
    AsJson,
    Overrides,
    screen,
)

Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, such as http://127.0.0.1:8265 [RAY_API_SERVER_ADDRESS]."
    ),
]
JobName = Annotated[
    str, typer.Argument(metavar="JOB", help="Submission id, as `mgpp jobs` shows it.")
]


def submit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML file of a run or campaign.")
    ],
    overrides: Overrides = None,
    address: Address = None,
    campaign: Annotated[bool, typer.Option("--campaign", help="CONFIG is a campaign.")] = False,
    working_dir: Annotated[
        str, typer.Option(help="Folder to ship, with CONFIG in it; the job runs in a copy.")
    ] = ".",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of files not to ship, as in .gitignore; repeatable."),
    ] = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(help="Folder that all nodes have, under the same path; repeatable."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once instead of following the job.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a configuration as a job on a Ray cluster, show its log, and exit as it did.

    A run that is already running there is followed, not started again.
    """
    with reported_errors(as_json, of_run=True) as end:
        from launch.cluster import jobs
        from launch.cluster.submission import make_submission

        submission = make_submission(
            config,
            list(overrides or []),
            command="campaign" if campaign else "run",
            working_dir=working_dir,
            excludes=exclude or [],
            shared=shared or [],
            allow_code=allow_code,
        )
        client = jobs.connect(address)
        job, was_there = jobs.submit(client, submission)
        typer.echo(
            f"{job} {'is already running; following it' if was_there else 'submitted'}", err=True
        )
        if detach:
            if not as_json:
                typer.echo(job)
            end({"status": "submitted", "job": job})
            return
        end.kept = lambda: f"{job} runs on"
        end.todo = f"follow it: mgpp logs {job} --follow; stop it: mgpp stop {job}"
        _end(jobs.follow(client, job, _write), job, end)


def logs(
    job: JobName,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow it until the job ends.")
    ] = False,
) -> None:
    """Show a job's log."""
    with reported_errors(as_json=False) as end:
        from launch.cluster import jobs

        client = jobs.connect(address)
        jobs.find_job(client, job)
        if follow:
            _end(jobs.follow(client, job, _write), job, end)
        else:
            _write(client.get_job_logs(job))


def stop(
    job: JobName,
    address: Address = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait for its end; its run's cluster.stop_grace_s and a minute unless given."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Stop a job; it saves the step under way first, and submitting it again resumes from there."""
    with reported_errors(as_json) as emit:
        from launch.cluster import jobs

        client = jobs.connect(address)
        grace = jobs.grace_of(jobs.find_job(client, job))
        client.stop_job(job)  # a signal, and the grace later, if it still runs, a second one
        if not as_json:
            typer.echo(f"{job} is asked to stop, for which it has {grace:g} s", err=True)
        outcome = jobs.wait(client, job, grace + 60.0 if timeout is None else timeout)
        lines = client.get_job_logs(job).splitlines()
        told = [line for line in lines if line.startswith("stopped: ")]
        message = told[-1] if told else f"had already ended: {outcome.job_status}"
        if not as_json:
            typer.echo(f"{job}  {message}")
        emit({"status": outcome.job_status, "job": job, "message": message})


def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs that mgpp submitted to a cluster."""
    with reported_errors(as_json) as emit:
        from launch.cluster import jobs

        found = jobs.our_jobs(jobs.connect(address))
        if not as_json:
            table = Table()
            for name in ("job", "status", "started, UTC", "minutes", "command"):
                table.add_column(name, justify="right" if name == "minutes" else "left")
            for job in found:
                table.add_row(
                    job.submission_id,
                    str(job.status),
                    _time(job.start_time),
                    _minutes(job),
                    job.entrypoint,
                )
            screen().print(table)
        emit(
            {
                "status": "listed",
                "jobs": [
                    {
                        "job": job.submission_id,
                        "status": str(job.status),
                        "started": job.start_time,
                        "ended": job.end_time,
                        "command": job.entrypoint,
                        "exit_code": job.driver_exit_code,
                    }
                    for job in found
                ],
            }
        )


def add_to(app: typer.Typer) -> None:
    """Add these commands to the top level."""
    app.command()(submit)
    app.command("jobs")(list_jobs)
    app.command()(logs)
    app.command()(stop)


def _end(outcome: Any, job: str, ending: Ending) -> None:
    """Exit as the job did."""
    words = f"{job} {outcome.job_status}"
    more = {"job": job, "job_status": outcome.job_status}
    if not outcome.exit_code:
        ending.done({"status": "done", **more, "exit_code": 0}, words)
        return
    end = End(
        status=outcome.status,
        code=outcome.exit_code,
        happened=f"{words}: {outcome.message}" if outcome.message else words,
        kept="what its log says",
        todo=f"its log: mgpp logs {job}; submit the same command again to resume",
        more=more,
    )
    ending.tell(end)
    raise typer.Exit(end.code)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _time(milliseconds: int | None) -> str:
    if not milliseconds:
        return "-"
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M}"


def _minutes(job: Any) -> str:
    if not job.start_time:
        return "-"
    end = job.end_time / 1000 if job.end_time else datetime.now(UTC).timestamp()
    return f"{(end - job.start_time / 1000) / 60:.1f}"
