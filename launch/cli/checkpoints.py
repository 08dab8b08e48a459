"""The commands of checkpoints: `mgpp pack`, `unpack`, `check`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.cli.ends import reported_errors
from launch.cli.output import AsJson, narrator, screen

if TYPE_CHECKING:
    from mgpp.sparse.checkpoint import Packing
    from mgpp.sparse.zeros import Zeros
    from pipeline.store.artifacts import Artifact

NOTHING = "here is neither a checkpoint (config.json) nor a finished artifact"

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER",
        help="Folder of a Hugging Face checkpoint, or an export's artifact, local or a URL.",
    ),
]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to make.")]


def pack(folder: Checkpoint, output: Output, as_json: AsJson = False) -> None:
    """Write a copy of a checkpoint whose pruned matrices are stored without zeros."""
    from mgpp.sparse.checkpoint import pack_checkpoint

    _convert(pack_checkpoint, folder, output, inner="model", as_json=as_json, status="packed")


def unpack(folder: Checkpoint, output: Output, as_json: AsJson = False) -> None:
    """Write the plain checkpoint that a packed one was made of; any tool reads that."""
    from mgpp.sparse.checkpoint import unpack_checkpoint

    _convert(unpack_checkpoint, folder, output, inner="packed", as_json=as_json, status="unpacked")


def check(folder: Checkpoint, as_json: AsJson = False) -> None:
    """Count the zeros of a checkpoint's matrices; exit with 1 if some that its export had are lost."""
    with reported_errors(as_json) as emit:
        from mgpp.sparse.reading import PackedError
        from mgpp.sparse.zeros import by_pattern, count_zeros, kept_zeros, noted_zeros
        from pipeline.errors import ConfigError, Problem, StageError

        source = local_checkpoint(folder, "model")
        try:
            counted, noted = count_zeros(source), noted_zeros(source)
        except PackedError as error:
            raise ConfigError([Problem("FOLDER", str(error))]) from error
        found = by_pattern(counted)
        kept = kept_zeros(noted, found)
        lost = {name: count - kept[name] for name, count in noted.items() if kept[name] < count}
        if not as_json:
            screen().print(_zeros_table(found))
            typer.echo(_verdict(noted, lost))
        if lost:
            raise StageError(f"{sum(lost.values()):,} zeros are lost, in {', '.join(lost)}")
        emit(
            {
                "status": "kept" if noted else "counted",
                "zeros": {name: vars(zeros) for name, zeros in counted.items()},
                "noted": noted,
            }
        )


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(pack)
    app.command()(unpack)
    app.command()(check)


def _convert(
    convert: Callable[..., "Packing"],
    folder: str,
    output: str,
    *,
    inner: str,
    as_json: bool,
    status: str,
) -> None:
    with reported_errors(as_json) as emit:
        target = Path(output).expanduser()
        source = local_checkpoint(folder, inner)
        with _refused(output), _progress(status) as progress:
            found = convert(source, target, progress=progress)
        ratio = found.plain_bytes / found.packed_bytes
        if not as_json:
            sizes = [_megabytes(found.plain_bytes), _megabytes(found.packed_bytes)]
            before, after = sizes if status == "packed" else reversed(sizes)
            typer.echo(
                f"{target}: {len(found.packed)} weights {status}, {before} before, {after} after; "
                f"packed is {ratio:.2f} times smaller"
            )
        emit(
            {
                "status": status,
                "path": str(target.resolve()),
                "plain_bytes": found.plain_bytes,
                "packed_bytes": found.packed_bytes,
                "ratio": ratio,
                "weights": list(found.packed),
            }
        )


def local_checkpoint(given: str, inner: str, name: str = "FOLDER") -> Path:
    """Return the folder of a checkpoint: itself, or in an artifact, fetched if that is remote.

    Args:
        given: on the command line.
        inner: the folder within an artifact.
        name: of the argument, for errors.

    Raises:
        ConfigError: if there is none.
    """
    from pipeline.errors import ConfigError, Problem
    from pipeline.store.locations import resolve_path

    try:
        place = resolve_path(given).rstrip("/")
        if "://" not in place and (Path(place).expanduser() / "config.json").is_file():
            return Path(place).expanduser()
        found = artifact_at(place, inner)
        if found is not None:
            artifact, part = found
            return artifact.path / part
    except (ValueError, ImportError) as error:
        raise ConfigError([Problem(name, str(error), got=given)]) from error
    raise ConfigError([Problem(name, NOTHING, got=given)])


def artifact_at(place: str, inner: str) -> "tuple[Artifact, str] | None":
    """Return the artifact at a place, or the one it is a folder of, and the name of the folder meant.

    Args:
        place: folder or URL, without a slash at its end.
        inner: the folder within an artifact, where the place is the artifact itself.
    """
    from pipeline.store.artifacts import open_artifact

    parent, _, last = place.rpartition("/")
    for url, part in ((place, inner), (parent, last)):
        with suppress(FileNotFoundError):
            return open_artifact(url), part
    return None


def _zeros_table(found: Mapping[str, "Zeros"]) -> Table:
    table = Table()
    table.add_column("matrices")
    for name in ("number", "sparsity", "zeros", "weights"):
        table.add_column(name, justify="right")
    for name, zeros in found.items():
        share = f"{zeros.zeros / zeros.numel:.2%}" if zeros.numel else "-"
        table.add_row(name, f"{zeros.matrices}", share, f"{zeros.zeros:,}", f"{zeros.numel:,}")
    return table


def _verdict(noted: Mapping[str, int], lost: Mapping[str, int]) -> str:
    if not noted:
        return "config.json does not say what was pruned (pruning_config.zeros): nothing to compare"
    total = sum(noted.values())
    return f"{total - sum(lost.values()):,} of the {total:,} zeros of the export are there"


@contextmanager
def _refused(output: str) -> Iterator[None]:
    """Report what cannot be packed or unpacked as a problem of the arguments."""
    from mgpp.sparse.reading import PackedError
    from pipeline.errors import ConfigError, Problem, StageError, is_storage_failure

    try:
        yield
    except PackedError as error:
        raise ConfigError([Problem("FOLDER", str(error))]) from error
    except FileExistsError as error:
        raise ConfigError([Problem("OUTPUT", "exists already", got=output)]) from error
    except OSError as error:
        if not is_storage_failure(error):
            raise
        raise StageError(f"OUTPUT: {error}") from error


@contextmanager
def _progress(status: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error, and give what moves it."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = narrator()
    quiet = not console.is_terminal  # then nothing would move, but an empty line be left
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(status, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
