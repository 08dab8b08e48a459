"""The commands of clusters: `mgpp cluster render`, `mgpp cluster wait`."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from launch.cli.ends import reported_errors
from launch.cli.output import AllowCode, AsJson, Overrides, raise_for

app = typer.Typer(
    no_args_is_help=True, help="Write the files that start a cluster; wait for one; its dashboard."
)


@app.command()
def render(
    target: Annotated[str, typer.Argument(help="ray-up, kuberay, slurm or skypilot.")],
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file to run there.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Number of machines that train.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each machine.")] = 0,
    cpus_per_node: Annotated[
        int | None,
        typer.Option(help="CPU cores of each machine; those of its workers unless given."),
    ] = None,
    memory_gib: Annotated[
        int | None, typer.Option(help="Memory of each machine, GiB; as planned unless given.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Container image with mgpp in it.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another key of the description, such as partition=gpu.",
        ),
    ] = None,
    campaign: Annotated[bool, typer.Option("--campaign", help="CONFIG is a campaign.")] = False,
    output: Annotated[str, typer.Option(help="Folder to write the files to.")] = ".",
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Write the files that start a cluster and run a configuration on it.

    --set takes every key of the description: name, shared_memory_gib, install, retries, elastic, claim
    (kuberay); provider, region, instance_type, head_ip, worker_ips, ssh_user (ray-up); gpu_type
    (skypilot); partition, time_limit (slurm); setup (slurm, ray-up); port.
    """
    with reported_errors(as_json) as emit:
        from launch.cluster.description import describe_cluster
        from launch.cluster.render import TARGETS, render_cluster
        from pipeline.errors import Problem
        from pipeline.runs.config import read_config

        if target not in TARGETS:
            raise_for([Problem("TARGET", got=target, allowed=TARGETS)])
        changes = list(overrides or [])
        own = str(read_config(config, changes)[0].get("name", "mgpp"))
        description = describe_cluster(
            {
                "name": own.lower().replace("_", "-").replace(".", "-"),
                "nodes": nodes,
                "gpus_per_node": gpus_per_node,
                **({"cpus_per_node": cpus_per_node} if cpus_per_node is not None else {}),
                **({"memory_gib": memory_gib} if memory_gib is not None else {}),
                **({"image": image} if image else {}),
            },
            more or [],
        )
        command = "campaign" if campaign else "run"
        files = render_cluster(
            target,  # type: ignore[arg-type]
            description,
            config,
            changes,
            command=command,
            allow_code=allow_code,
        )
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
            if not as_json:
                typer.echo(str(folder / file))
        emit({"status": "written", "files": [str(folder / file) for file in files]})


@app.command()
def wait(
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes to wait for.")] = 1,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 300.0,
    address: Annotated[
        str | None, typer.Option(help="Address of the cluster [RAY_ADDRESS].")
    ] = None,
) -> None:
    """Wait until a cluster has this many nodes."""
    with reported_errors(as_json=False):
        from launch.cluster.connect import wait_for_nodes

        there = wait_for_nodes(nodes, timeout, address)
        typer.echo(f"the cluster has {there} nodes")


@app.command()
def dashboard() -> None:
    """Print a Grafana dashboard of runs (JSON) that reads Ray's metrics from Prometheus."""
    typer.echo(
        (files("launch.cluster") / "templates" / "grafana-dashboard.json").read_text().rstrip()
    )
