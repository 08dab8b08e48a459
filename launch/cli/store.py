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

app = typer.Typer(no_args_is_help=True, help="What runs left in their storage.")

Storage = Annotated[
    str, typer.Argument(metavar="[STORAGE]", help="Folder or URL: a run's `storage`.")
]


@app.command("ls")
def list_store(storage: Storage = "runs", as_json: AsJson = False) -> None:
    """List what is done, running, or was begun."""
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
        typer.Option(min=0, help="Days after which what was begun and not gone on with goes too."),
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what nobody needs: attempts that were given up, what work in progress left over.

    What is done stays, and so does whatever a run works on.
    """
    with reported_errors(as_json) as emit:
        from pipeline.store.maintenance import entries, rubbish, usable_store

        store = usable_store(storage)
        found = [
            piece
            for entry in entries(store)
            for piece in rubbish(entry, older_than_days=older_than)
        ]
        for piece in found:
            if not dry_run:
                store.discard(piece.url)
            if not as_json:
                typer.echo(f"{size_text(piece.size):>12}  {piece.url}  ({piece.why})")
        freed = sum(piece.size for piece in found)
        if not as_json:
            typer.echo(f"{size_text(freed)} {'would be' if dry_run else 'were'} freed")
        urls = [piece.url for piece in found]
        emit({"status": "listed" if dry_run else "cleared", "bytes": freed, "urls": urls})


@app.command()
def verify(
    storage: Storage = "runs",
    discard: Annotated[
        bool, typer.Option("--discard", help="Delete damaged ones: their runs make them again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every finished artifact through and compare it with its checksums."""
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
            how = "deleted; their runs make them again" if discard else "--discard deletes them"
            raise StageError("\n".join(problems) + f"\n{how}")
        if not as_json:
            typer.echo(f"{len(found)} artifacts are as they were written")
        emit({"status": "verified", "num_artifacts": len(found)})
