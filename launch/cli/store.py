"""The commands of a store: `mgpp store ls`, `gc`, `verify`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from launch.cli.ends import reported_errors
from launch.cli.output import (
    AsJson,
    narrator,
    screen,
    size_text,
    warn,
)

app = typer.Typer(no_args_is_help=True, help="The artifacts in a run's storage.")

Storage = Annotated[
    str, typer.Argument(metavar="[STORAGE]", help="Folder or URL: a run's `storage`.")
]


@contextmanager
def _storage_errors(storage: str) -> Iterator[None]:
    """Turn what a storage library raises into one clear error."""
    from pipeline.errors import OF_THE_CODE, StageError
    from pipeline.storage.filesystems import storage_error_text

    try:
        yield
    except (StageError, *OF_THE_CODE):
        raise
    except Exception as error:
        raise StageError(f"{storage}: {storage_error_text(error)}") from error


@app.command("ls")
def list_store(storage: Storage = "runs", as_json: AsJson = False) -> None:
    """List what is done, running, unfinished or damaged."""
    with reported_errors(as_json) as emit, _storage_errors(storage):
        from pipeline.store.maintenance import damaged_choices, entries, existing_store

        store = existing_store(storage)
        found, choices = list(entries(store)), damaged_choices(store)
        if not as_json:
            table = Table()
            for name in ("stage", "key", "state", "changed, UTC"):
                table.add_column(name)
            table.add_column("size", justify="right")
            for entry in found:
                holder = f": {entry.lease}" if entry.state == "running" else ""
                table.add_row(
                    entry.stage,
                    entry.key,
                    entry.state + holder,
                    f"{entry.changed:%Y-%m-%d %H:%M}",
                    size_text(entry.size),
                )
            screen().print(table)
        damage = [text for entry in found for text in entry.damage_texts]
        warn([*damage, *map(str, choices)])
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
                        "damage": entry.damage,
                    }
                    for entry in found
                ],
                "damaged_choices": {error.url: error.reason for error in choices},
            }
        )


@app.command()
def gc(
    storage: Storage = "runs",
    older_than: Annotated[
        float,
        typer.Option(min=0, help="Also delete unfinished entries untouched for this many days."),
    ] = 7.0,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints",
            help="Of these, also those that have a checkpoint; their runs begin anew.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete abandoned attempts, leftovers of finished work, and old unfinished entries.

    Finished artifacts, whatever a run is working on, what it can resume from, and files that are not
    mgpp's are kept.
    """
    with reported_errors(as_json) as emit, _storage_errors(storage):
        from pipeline.store.maintenance import Limits, clear, existing_store

        store = existing_store(storage)
        limits = Limits(older_than_days=older_than, checkpoints=checkpoints)
        found = []
        for item in clear(store, limits, dry_run=dry_run, tell=narrator().print):
            found.append(item)
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
            "--discard", help="Delete what is damaged; rerunning its runs makes it again."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every finished artifact and every checkpoint, and compare them with their checksums."""
    with reported_errors(as_json) as emit, _storage_errors(storage):
        from pipeline.errors import StageError
        from pipeline.store.maintenance import (
            damaged_choices,
            discard_damaged,
            entries,
            existing_store,
        )
        from pipeline.store.verification import verified

        store = existing_store(storage)
        listed = list(entries(store))
        found = [entry.artifact for entry in listed if entry.artifact is not None]
        unsealed = sum(artifact.checksum is None for artifact in found)
        num_checkpoints = sum(len(entry.checkpoints) for entry in listed)
        checked = [
            verified(e) for e in track(listed, "verifying", console=narrator(), transient=True)
        ]
        damaged, choices = [entry for entry in checked if entry.damage], damaged_choices(store)
        problems = [text for entry in damaged for text in entry.damage_texts]
        problems += map(str, choices)
        if problems and not discard:
            raise StageError("\n".join([*problems, "--discard deletes what is damaged"]))
        if problems:
            freed = {entry.url for entry in discard_damaged(store, damaged, narrator().print)}
            for error in choices:
                store.discard(error.url)
            problems += [f"{e.url}: in use, not deleted" for e in damaged if e.url not in freed]
            raise StageError("\n".join([*problems, "deleted; rerun their runs to make them again"]))
        if not as_json:
            beside = f" and {num_checkpoints} checkpoints" if num_checkpoints else ""
            typer.echo(f"{len(found)} artifacts{beside} match their checksums")
            if unsealed:
                typer.echo(
                    f"{unsealed} of them are of an earlier version, without a checksum of their "
                    "manifest: their metrics are taken as they are"
                )
        emit(
            {
                "status": "verified",
                "num_artifacts": len(found),
                "num_checkpoints": num_checkpoints,
                "num_unsealed": unsealed,
            }
        )
