"""The command `mgpp push`: a checkpoint goes to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.cli.checkpoints import NOTHING, artifact_at
from launch.cli.ends import reported_errors
from launch.cli.output import AsJson

_FOLDERS = {"plain": "model", "packed": "packed", "onnx": "onnx"}


def push(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="An export's artifact, or the folder of a checkpoint, plain or packed; local or a URL.",
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository of models: OWNER/NAME.")
    ],
    copy: Annotated[
        Literal["plain", "packed", "onnx"],
        typer.Option("--format", help="Which copy of an export's artifact is uploaded."),
    ] = "plain",
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository visible to its owner alone.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Replace what the repository holds, if it exists."),
    ] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Message of the commit.")
    ] = "Upload with mgpp",
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint with its model card to the Hugging Face hub; rerun it to resume an upload."""
    with reported_errors(as_json) as emit:
        from pipeline.storage.push import push_folder

        folder = _checkpoint(artifact, copy)
        done = push_folder(folder, repository, private=private, update=update, message=message)
        if not as_json:
            sent = f"{done.num_files} files, {done.num_bytes / 1e6:,.1f} MB"
            what = "is complete already" if done.commit is None else f"commit {done.commit[:12]}"
            typer.echo(f"{done.url}: {sent}; {what}")
        emit({"status": "pushed", **vars(done)})


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(push)


def _checkpoint(given: str, copy: str) -> Path:
    """Return the folder of a checkpoint; an artifact's files are compared with what was committed.

    Raises:
        ConfigError: if there is none.
    """
    from mgpp.sparse.reading import PackedError, config_of, packed_weights, weight_files
    from pipeline.errors import ConfigError, Problem

    try:
        folder = _located(given, copy)
        packed_weights(config_of(folder))
        of_onnx = folder.name == "onnx" and (folder / "model.onnx").is_file()
        missing = [f for f in ([] if of_onnx else weight_files(folder)) if not f.is_file()]
        if missing:
            raise PackedError(f"{folder} has no {missing[0].name}, which its index names")
    except (ValueError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([Problem("ARTIFACT", str(error), got=given)]) from error
    return folder


def _located(given: str, copy: str) -> Path:
    """Return the folder that is meant: of an artifact first, for then its files are checked."""
    from pipeline.errors import ConfigError, Problem
    from pipeline.store.locations import resolve_path

    place = resolve_path(given).rstrip("/")
    found = artifact_at(place, _FOLDERS[copy])
    if found is not None:
        artifact, part = found
        if not any(file.startswith(f"{part}/") for file in artifact.files):
            why, hint = f"has no folder {part!r}", "export.format says which copies are written"
            raise ConfigError([Problem("ARTIFACT", why, got=given, hint=hint)])
        return artifact.path / part
    folder = Path(place).expanduser()
    if "://" in place or not folder.is_dir():
        raise ConfigError([Problem("ARTIFACT", NOTHING, got=given)])
    return folder
