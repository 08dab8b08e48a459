"""The command `mgpp bench`: how fast a checkpoint runs on this machine's CPU, in each variant."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.cli.checkpoints import local_checkpoint
from launch.cli.ends import reported_errors
from launch.cli.output import AsJson, narrator, raise_for, screen, warn
from pipeline.errors import ConfigError, Problem

_MOST = 1 << 20  # of a batch or a length: beyond it, a number is a slip of the finger


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a checkpoint, plain or packed, or an export's artifact, local or a URL.",
        ),
    ],
    batch: Annotated[str, typer.Option(help="Rows of a forward pass, such as 1,8.")] = "1,8",
    length: Annotated[
        str | None,
        typer.Option(help="Tokens of a row, such as 16,128: the default, if the model takes them."),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(help="Which of fp32, bf16, int8, sparse; fp32 is always measured."),
    ] = "fp32,bf16,int8,sparse",
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch; its own choice by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed passes of each variant at each size.")] = 20,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens that a model which generates makes; 0 leaves that out.")
    ] = 16,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, in a process for each variant.")
    ] = True,
    figure: Annotated[
        str | None, typer.Option(help="Write tables and a figure to this HTML file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint on this CPU: dense fp32, bf16, int8 dynamic and sparse, side by side."""
    with reported_errors(as_json) as emit:
        batches = _numbers("--batch", batch)
        lengths = None if length is None else _numbers("--length", length)
        chosen = _variants(variants)
        least = {
            "--threads": (threads, 1),
            "--rounds": (rounds, 1),
            "--new-tokens": (new_tokens, 0),
        }
        raise_for(
            [
                Problem(name, got=value, allowed=[f"whole numbers from {low} to {_MOST:,}"])
                for name, (value, low) in least.items()
                if value is not None and not low <= value <= _MOST
            ]
        )
        page = None if figure is None else _writable(figure)
        folder = local_checkpoint(model, "model", name="MODEL")
        found = _measured(
            folder,
            batches=batches,
            lengths=lengths,
            variants=chosen,
            threads=threads,
            rounds=rounds,
            new_tokens=new_tokens,
            memory=memory,
        )
        if page is not None:
            from pipeline.benchmarks.page import write_page  # plotly is slow to import

            write_page(page, folder.name if folder.name != "model" else folder.parent.name, found)
        if not as_json:
            _show(found)
            if page is not None:
                typer.echo(f"figure  {page}")
        warn(found["warnings"])
        emit({"status": "measured", "model": str(folder.resolve()), **found})


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(bench)


def _measured(folder: Path, *, lengths: tuple[int, ...] | None, **given: Any) -> dict[str, Any]:
    """Return what is measured of a checkpoint, with a bar on standard error meanwhile.

    Raises:
        ConfigError: if it cannot be measured, or takes no rows of such a length.
    """
    from transformers.utils import logging

    from pipeline.benchmarks.inputs import longest_of
    from pipeline.benchmarks.measure import NotMeasurableError, Workload, measure

    logging.disable_progress_bar()  # its bars, one a variant, come between
    try:
        longest = longest_of(folder)
        if lengths and longest is not None and max(lengths) > longest:
            allowed = [f"1 to {longest}, the model's positions"]
            raise ConfigError([Problem("--length", got=max(lengths), allowed=allowed)])
        with _progress() as progress:
            return measure(folder, Workload(lengths=lengths, **given), progress)
    except ConfigError:
        raise
    except (NotMeasurableError, OSError, ValueError) as error:
        raise ConfigError([Problem("MODEL", " ".join(str(error).split()))]) from error
    finally:
        logging.enable_progress_bar()


def _numbers(name: str, given: str) -> tuple[int, ...]:
    """Return the numbers of an option, each once.

    Raises:
        ConfigError: if they are not such numbers.
    """
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= _MOST for part in parts):
        allowed = [f"whole numbers from 1 to {_MOST:,}, separated by commas"]
        raise ConfigError([Problem(name, got=given, allowed=allowed)])
    return tuple(dict.fromkeys(int(part) for part in parts))


def _variants(given: str) -> tuple[str, ...]:
    known = ("fp32", "bf16", "int8", "sparse")  # with VARIANTS would come torch: seconds
    names = [name.strip() for name in given.split(",")]
    if not set(names) <= set(known):
        raise ConfigError([Problem("--variants", got=given, allowed=known)])
    return tuple(names)


def _writable(given: str) -> Path:
    """Return the file to write, before minutes are spent on what goes into it.

    Raises:
        ConfigError: if its folder is not there, or it is one.
    """
    path = Path(given).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            [Problem("--figure", got=given, allowed=["a file in a folder that exists"])]
        )
    return path


def _show(found: dict[str, Any]) -> None:
    """Print tables and sentences."""
    from pipeline.benchmarks.summary import explanation, notes, size_table, variant_table

    for head, rows in (size_table(found), variant_table(found)):
        screen().print(_table(head, rows))
    for line in [*notes(found), "", *found["summary"], "", explanation(found)]:
        typer.echo(line)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on standard error, and give what moves it."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    console = narrator()
    quiet = not console.is_terminal  # then nothing would move, but an empty line be left
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("bench", total=None)

        def moved(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        yield moved
