"""The commands of a store: `mgpp store ls`, `gc`, `verify`."""

from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from launch.cli.output import (
    AsJson,
    narrator,
    reported_errors,
    screen,
    size_text,
)

app = typer.Typer(no_args_is_help=True, help="The artifacts in a run's storage.")

Storage = Annotated[
    str, typer.Argument(metavar="[STORAGE]", help="Folder or URL: a run's `storage`.")
]


@app.command("ls")
def list_store(storage: Storage = "runs", as_json: AsJson = False) -> None:
    """List what is done, running or unfinished."""
    with reported_errors(as_json) as emit:
        from pipeline.store.maintenance import entries, usable_store

        found = list(entries(usable_store(storage)))
        if not as_json:
            table = Table()
            for name in ("stage", "key", "state", "changed, UTC"):
                table.add_column(name)
            table.add_column("size", justify="right")
            for entry in found:
                changed = f"{entry.changed:%Y-%m-%d %H:%M}" if entry.changed else "-"
                holder = f": {entry.lease}" if entry.state == "running" else ""
                table.add_row(
                    entry.stage, entry.key, entry.state + holder, changed, size_text(entry.size)
                )
            screen().print(table)
        emit(
            {
                "status": "listed",
                "entries": [
                    {
                        "stage": entry.stage,
                        "key": entry.key,
                        "state": entry.state,
                        "bytes": entry.size,
                        "changed": entry.changed,
                        "url": entry.url,
                    }
                    for entry in found
                ],
            }
        )


@app.command()
def gc(
    storage: Storage = "runs",
    older_than: Annotated[
        float,
        typer.Option(min=0, help="Also delete unfinished entries untouched for this many days."),
    ] = 7.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete abandoned attempts, leftovers of finished work, and old unfinished entries.

    Finished artifacts and whatever a run is working on are kept.
    """
    with reported_errors(as_json) as emit:
        from pipeline.store.maintenance import Garbage, entries, garbage, usable_store
        from pipeline.store.parts import abandoned_parts

        store = usable_store(storage)
        found = [
            item for entry in entries(store) for item in garbage(entry, older_than_days=older_than)
        ]
        for folder, size, why in abandoned_parts(store, older_than_days=older_than):
            found.append(Garbage(url=str(folder), size=size, why=why))
        for item in found:
            if not dry_run:
                store.discard(item.url)
            if not as_json:
                typer.echo(f"{size_text(item.size):>12}  {item.url}  ({item.why})")
        freed = sum(item.size for item in found)
        if not as_json:
            typer.echo(f"{size_text(freed)} {'would be' if dry_run else 'were'} freed")
        urls = [item.url for item in found]
        emit({"status": "listed" if dry_run else "cleared", "bytes": freed, "urls": urls})


@app.command()
def verify(
    storage: Storage = "runs",
    discard: Annotated[
        bool,
        typer.Option(
            "--discard", help="Delete damaged artifacts; rerunning their runs makes them again."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every finished artifact and compare it with its checksums."""
    with reported_errors(as_json) as emit:
        from pipeline.errors import StageError
        from pipeline.store.maintenance import entries, problems_of, usable_store

        store = usable_store(storage)
        found = [entry for entry in entries(store) if entry.artifact is not None]
        problems = []
        for entry in track(found, "artifacts", console=narrator(), transient=True):
            damage = problems_of(entry)
            problems += damage
            if damage and discard:
                store.discard(entry.url)
        if problems:
            how = (
                "deleted; rerun their runs to make them again"
                if discard
                else "--discard deletes them"
            )
            raise StageError("\n".join(problems) + f"\n{how}")
        if not as_json:
            typer.echo(f"{len(found)} artifacts match their checksums")
        emit({"status": "verified", "num_artifacts": len(found)})
