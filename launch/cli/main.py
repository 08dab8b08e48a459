"""The command line: `mgpp run`, `validate`, `plan`, `show`, `schema`, and the groups."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from launch.cli import bench, campaign, checkpoints, cluster, jobs, push, store
from launch.cli.ends import reported_errors
from launch.cli.output import (
    AllowCode,
    AsJson,
    Overrides,
    narrator,
    raise_for,
    screen,
    warn,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune large pretrained transformers under a mixture-Gaussian prior.",
)
jobs.add_to(app)
checkpoints.add_to(app)
bench.add_to(app)
push.add_to(app)
app.add_typer(campaign.app, name="campaign")
app.add_typer(cluster.app, name="cluster")
app.add_typer(store.app, name="store")

_MAKE_AGAIN = "rerunning its run makes it again"

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from mgpp.version import __version__  # with it comes torch: seconds, for every command

        typer.echo(f"mgpp {__version__}")
        raise typer.Exit


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run all stages that are not done: data, dense, prune, evaluate, export, report."""
    with reported_errors(as_json, of_run=True) as end:
        from launch.cluster.connect import (
            address_of,
            connected_on_demand,
            hardware_of,
            local_capacity,
        )
        from launch.driver.run import all_done, last_saved, nodes_cleared, run_stages
        from pipeline.runs.flow import plan_stages
        from pipeline.runs.hardware import Choices, described
        from pipeline.runs.node_memory import node_memory_problems
        from pipeline.runs.validate import cluster_problems, core_problems, validate
        from pipeline.storage.filesystems import storage_problems
        from pipeline.store.maintenance import readable_store
        from pipeline.tasks import make_task

        console = narrator()
        changes = list(overrides or [])
        joins = _joins_a_cluster(config, changes)
        capacity = None if joins else local_capacity()
        settings = validate(config, changes, capacity, allow_code=allow_code)
        store = readable_store(settings.storage)
        with connected_on_demand(settings.cluster, end.lost) as connect:
            choices = Choices(store.url, lambda: hardware_of(settings.cluster, connect))
            begun = choices.has_begun(settings)
            settled = choices.settle(settings)
            warn(choices.warnings())
            console.print(f"{'workers':<9} {described(settled)}{', as it began' if begun else ''}")
            stages = plan_stages(settled)  # once: it reads the model's files through
            end.resumable(lambda: last_saved(stages, store))
            if all_done(stages, store):
                result = run_stages(stages, settled, store, console)
            else:
                raise_for(storage_problems(store.url))
                connect()
                there = hardware_of(settled.cluster, connect).capacity
                raise_for(cluster_problems(settled.cluster, there))
                raise_for(core_problems(settled.data, there))
                raise_for(node_memory_problems(settled, there))
                choices.record()
                with nodes_cleared(store):
                    alone = address_of(settled.cluster) is None
                    result = run_stages(
                        stages, settled, store, console, here=alone, signals=end.signals
                    )
        summary = result.summary()
        if not as_json:
            screen().print(_table(summary, result.artifacts, make_task(settings.task)))
            typer.echo(_next_steps(summary, make_task(settings.task), config, settings))
            warn(summary["warnings"])
        end.done(summary, f"{', '.join(result.artifacts)} are in {store.url}")


@app.command()
def validate(
    config: ConfigPath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Check a configuration, its model, its data and whether its workers fit; start nothing."""
    with reported_errors(as_json) as emit:
        from launch.cluster.connect import connected_on_demand, hardware_of, local_capacity
        from pipeline.runs.coverage import planned_coverage
        from pipeline.runs.flow import plan_stages
        from pipeline.runs.hardware import Choices, described
        from pipeline.runs.node_memory import node_memory_problems
        from pipeline.runs.validate import cluster_problems, look_through
        from pipeline.storage.filesystems import absolute_url, storage_problems

        changes = list(overrides or [])
        joins = _joins_a_cluster(config, changes)
        capacity = None if joins else local_capacity()
        checked = look_through(config, changes, capacity, allow_code=allow_code)
        settings = checked.config
        raise_for(storage_problems(settings.storage))
        with connected_on_demand(settings.cluster) as connect:
            where = absolute_url(settings.storage)
            choices = Choices(where, lambda: hardware_of(settings.cluster, connect))
            settled = choices.settle(settings)
        if not joins:
            here = local_capacity()
            raise_for(cluster_problems(settled.cluster, here))
        keys, warnings = {}, choices.warnings()
        if not checked.unchecked:
            if not joins:
                raise_for(node_memory_problems(settled, here))
            keys = {stage.name: stage.key for stage in plan_stages(settled)}
            coverage = planned_coverage(settings).warning
            warnings += [coverage] if coverage else []
        if not as_json:
            extent = ", as far as it was checked" if checked.unchecked else ""
            typer.echo(f"{config} is valid{extent}: {described(settled)}")
            for name, key in keys.items():
                typer.echo(f"  {name:<9} {key}")
            for problem in checked.unchecked:
                typer.echo(f"not checked: {_unchecked(problem)}")
            warn(warnings)
        unchecked = [problem.key for problem in checked.unchecked]
        emit({"status": "valid", "keys": keys, "unchecked": unchecked, "warnings": warnings})


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu_memory_gib: Annotated[
        float | None,
        typer.Option(min=0, help="Memory of each worker's device; adds whether the run fits."),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Nodes that share the workers; adds the memory that each needs."),
    ] = None,
    node_memory_gib: Annotated[
        float | None,
        typer.Option(
            min=0, help="Memory of each node; adds whether its workers fit, with --nodes."
        ),
    ] = None,
    bandwidth_gbit: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Gigabits a second that each worker sends at; adds seconds of communication a step.",
        ),
    ] = None,
    device_tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="10^12 operations a second that each device reaches; adds seconds of compute a step.",
        ),
    ] = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run needs per worker: memory, bytes sent, checkpoint size, time; start nothing."""
    with reported_errors(as_json) as emit:
        from dataclasses import asdict

        from launch.cli.plan_table import add_node, add_times, plan_table, planned_node
        from launch.cluster.connect import local_hardware
        from pipeline.errors import ConfigError
        from pipeline.planner.plan import plan_run
        from pipeline.planner.speed import step_time
        from pipeline.runs.config import parse_config, read_config
        from pipeline.runs.foreign_code import foreign_code
        from pipeline.runs.hardware import WITH_GPUS, settled
        from pipeline.runs.upstream import resolve_upstream

        values, problems = read_config(config, list(overrides or []))
        if not problems:
            values, problems = resolve_upstream(values, allow_code=allow_code)
        if problems:
            raise ConfigError(problems)
        hardware = WITH_GPUS if gpu_memory_gib is not None else local_hardware()
        settings = settled(parse_config(values, allow_code=True), hardware)
        raise_for([] if allow_code else foreign_code({"model": settings.model}))  # no rows are read
        found = plan_run(settings)
        room = None if gpu_memory_gib is None else gpu_memory_gib * 2**30
        needed = max(found.device_total, found.evaluation_total)
        fits = None if room is None else needed <= room
        node = planned_node(settings, found, nodes, node_memory_gib)
        warnings = [found.coverage.warning] if found.coverage.warning else []
        rates = {"device_tflops": device_tflops, "bandwidth_gbit": bandwidth_gbit}
        time = step_time(flops=found.flops_per_step, sent=found.sent_per_step, **rates)
        if not as_json:
            table = plan_table(settings, found, room)
            add_node(table, node)
            add_times(table, time, **rates)
            screen().print(table)
            warn(warnings)
        totals = {
            "device_total": found.device_total,
            "host_total": found.host_total,
            "evaluation_total": found.evaluation_total,
        }
        seconds = {**asdict(time), "shortest": time.shortest, "longest": time.longest, **rates}
        emit(
            {
                "status": "planned",
                **asdict(found),
                **totals,
                "fits": fits,
                "node": node,
                "seconds_per_step": seconds,
                "warnings": warnings,
            }
        )


@app.command(
    hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def compare() -> None:
    """Say what this command is now."""
    typer.echo("error: mgpp compare: no longer a command; use `mgpp campaign FILE`", err=True)
    raise typer.Exit(2)


@app.command()
def show(
    artifact: Annotated[str, typer.Argument(help="Folder of an artifact, local or a URL.")],
    as_json: AsJson = False,
) -> None:
    """Show what an artifact holds and what it was made from."""
    with reported_errors(as_json) as emit:
        from pipeline.errors import ConfigError, Problem
        from pipeline.storage.records import DamagedRecordError
        from pipeline.store.artifacts import open_artifact

        try:
            found = open_artifact(artifact)
        except FileNotFoundError as error:
            raise ConfigError(
                [Problem(artifact, str(error).removeprefix(f"{artifact}: "))]
            ) from error
        except DamagedRecordError as error:
            raise ConfigError([Problem(artifact, str(error), hint=_MAKE_AGAIN)]) from error
        values = dict(vars(found))
        if not as_json:
            from omegaconf import OmegaConf

            files = {name: entry["bytes"] for name, entry in found.files.items()}
            typer.echo(OmegaConf.to_yaml(OmegaConf.create({**values, "files": files})).rstrip())
        emit(values)


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from pipeline.runs.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _unchecked(problem: Any) -> str:
    """Return what was not checked for want of permission to run code, in words."""
    given = " ".join(filter(None, [problem.key, problem.got if problem.got is not True else ""]))
    what = "the data" if problem.key.startswith("data") else "the model"
    return f"{given}: {what}, and the keys that follow from it; {problem.hint}"


def _table(summary: dict[str, Any], artifacts: dict[str, Any], task: Any) -> Table:
    """Return the closing table: metrics, sparsity, sizes, seconds."""
    metrics, sizes = summary["metrics"], summary["bytes"]
    table = Table(title=f"{artifacts['export'].params['name']}", title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("pruned", justify="right")
    dense = metrics.get("dense", {})
    for name, value in metrics["pruned"].items():
        metric = task.metric(name)
        table.add_row(name, metric.text(dense.get(name)) if dense else "-", metric.text(value))
    figures = artifacts["export"].metrics
    counts = f"{figures['num_zeros']:,} of {figures['num_prunable']:,}"
    table.add_row("sparsity", "", f"{summary['sparsity']:.2%} ({counts})")
    counts = f"{figures['model_zeros']:,} of {figures['num_parameters']:,}"
    table.add_row("sparsity of all weights", "", f"{summary['model_sparsity']:.2%} ({counts})")
    for name, numel in summary["left_out"].items():
        table.add_row(f"not prunable: {name}", "", f"{numel:,}")
    table.add_row("size on disk", _megabytes(sizes.get("dense model")), _size(summary, "pruned"))
    if "packed model" in sizes:
        table.add_row("packed", "", _size(summary, "packed"))
    for name, compressed in summary["compressed_bytes"].items():
        sizes_of = f"{_megabytes(sizes[name])} ({_megabytes(compressed)} compressed)"
        table.add_row(name, "", sizes_of)
    table.add_section()
    for name, seconds in summary["seconds"].items():
        table.add_row(
            f"{name}, seconds", "", "cached" if name in summary["cached"] else f"{seconds:.1f}"
        )
    table.add_row("total, seconds", "", f"{sum(summary['seconds'].values()):.1f}")
    return table


def _next_steps(summary: dict[str, Any], task: Any, config: str, settings: Any) -> str:
    """Return where the results are and what to do with them."""
    lines = [
        f"model   {summary['model']}",
        f"report  {summary['report']}",
        "",
    ]
    others = [f"{name:<7} {summary[name]}" for name in ("packed", "onnx") if name in summary]
    lines[1:1] = others
    if "://" not in summary["model"]:
        lines += [
            "Open the report in a browser, or load the model:",
            f"  from transformers import {task.auto_model}",
            f'  model = {task.auto_model}.from_pretrained("{summary["model"]}")',
        ]
    sparsity = settings.prune.settings.sparsity
    if sparsity is not None:
        other = f"{(1 + sparsity) / 2:.3g}"
        lines += [
            "Try another sparsity; what does not depend on it is not run again:",
            f"  mgpp run {config} prune.sparsity={other}",
        ]
    return "\n".join(lines)


def _joins_a_cluster(config: str, overrides: list[str]) -> bool:
    """Return whether the run joins a cluster, from a file that may yet turn out wrong."""
    from launch.cluster.connect import joined_address
    from pipeline.runs.config import read_config

    cluster = read_config(config, overrides)[0].get("cluster")
    address = cluster.get("address") if isinstance(cluster, dict) else None
    return (
        joined_address("cluster.address", address if isinstance(address, str) else None) is not None
    )


def _size(summary: dict[str, Any], kind: str) -> str:
    """Return the size of a model that was exported, and how much of it is embeddings."""
    size = summary["bytes"][f"{kind} model"]
    share = summary["embedding_bytes"][f"{kind} model"] / size
    return f"{_megabytes(size)} ({share:.0%} embeddings)"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f} MB"


def _use_token() -> None:
    """Show the token of this machine if it has one, as Ray's own commands do and its job client does not.

    Before Ray is imported, for it looks once.
    """
    kept = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_TOKEN") or Path(kept).is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def main() -> None:
    """Run the command line."""
    _use_token()
    app()
