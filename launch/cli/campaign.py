"""The commands of campaigns: `mgpp campaign FILE`, `mgpp campaign status FILE`."""

from collections import Counter
from typing import Annotated, Any

import typer
from rich.table import Table

from launch.cli.ends import reported_errors
from launch.cli.output import (
    AllowCode,
    AsJson,
    Overrides,
    RunByDefault,
    narrator,
    raise_for,
    screen,
    warn,
)

app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Many runs on one cluster: `mgpp campaign CAMPAIGN`, and from another shell `status CAMPAIGN`.",
)

CampaignPath = Annotated[str, typer.Argument(metavar="CAMPAIGN", help="YAML file of the campaign.")]


@app.command()
def run(
    config: CampaignPath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Choose candidates, run every run that is not done, then write tables and a report page."""
    with reported_errors(as_json, of_run=True) as end:
        from launch.cluster.connect import (
            address_of,
            connected_on_demand,
            hardware_of,
            local_capacity,
        )
        from launch.driver.campaign import first_cluster, plan_campaign, run_campaign, runs_done
        from launch.driver.run import nodes_cleared
        from pipeline.campaigns.grid import read_campaign
        from pipeline.campaigns.report import PAGE_FILE
        from pipeline.campaigns.summary import MARKDOWN_FILE
        from pipeline.errors import StageError
        from pipeline.runs.hardware import Choices
        from pipeline.runs.node_memory import node_memory_problems
        from pipeline.runs.validate import cluster_problems, core_problems, validate
        from pipeline.store.maintenance import usable_store

        campaign = read_campaign(config, list(overrides or []))
        store = usable_store(campaign.storage)
        cluster = first_cluster(campaign)
        joins = address_of(cluster) is not None
        with connected_on_demand(cluster, end.lost) as connect:
            choices = Choices(store.url, lambda: hardware_of(cluster, connect))
            planned = plan_campaign(campaign, choices, allow_code=allow_code)
            warn(choices.warnings())
            end.resumable(lambda: runs_done(planned, store))
            runs = {**planned.final, **planned.selecting}
            seen = set()
            for each in runs:  # seeds and sparsities change nothing of what is checked
                if (kind := (each.place[:3], each.selecting)) not in seen:
                    seen.add(kind)
                    here = None if joins else local_capacity()
                    validate(each.recipe, each.overrides, here, allow_code=allow_code)
            connect()
            there = hardware_of(cluster, connect).capacity
            for run in runs.values():
                raise_for(cluster_problems(run.config.cluster, there))
                raise_for(core_problems(run.config.data, there))
                raise_for(node_memory_problems(run.config, there))
            choices.record()
            with nodes_cleared(store):
                made = run_campaign(campaign, planned, store, narrator(), end.signals)
        if not as_json:
            typer.echo(made.read_text(MARKDOWN_FILE))
            typer.echo(f"report  {made.url}/{PAGE_FILE}")
        if made.metrics["num_failed"]:
            raise StageError(
                f"{made.metrics['num_failed']} of {len(planned.final)} runs failed; the same command "
                f"runs only these again; {made.url}/{PAGE_FILE} says why"
            )
        end.done(
            {"status": "done", "url": made.url, **made.metrics}, f"all runs; {made.url}/{PAGE_FILE}"
        )


@app.command()
def status(
    config: CampaignPath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Show how each run stands, from the store: done, running, failed or waiting."""
    with reported_errors(as_json) as emit:
        from launch.driver.campaign import campaign_states, plan_campaign
        from launch.driver.progress import describe
        from pipeline.campaigns.grid import read_campaign
        from pipeline.runs.hardware import NO_GPUS, Choices
        from pipeline.storage.filesystems import absolute_url
        from pipeline.store.artifacts import ArtifactStore

        campaign = read_campaign(config, list(overrides or []))
        store = ArtifactStore(absolute_url(campaign.storage))
        # One that has not begun waits, whatever `auto` would come to.
        choices = Choices(store.url, lambda: NO_GPUS)
        planned = plan_campaign(campaign, choices, allow_code=allow_code)
        warn(choices.warnings())
        states = campaign_states(campaign, planned, store)
        counts: dict[str, Any] = dict(Counter(state.state for state in states))
        if not as_json:
            table = Table(title=campaign.name, title_justify="left")
            for name in ("run", "state", ""):
                table.add_column(name)
            for state in states:
                progress = f": {describe(state.progress)}" if state.progress else ""
                table.add_row(state.title, state.state, state.note + progress)
            screen().print(table)
            typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
        emit({"status": "listed", "counts": counts, "runs": [vars(state) for state in states]})
