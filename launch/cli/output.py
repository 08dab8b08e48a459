"""What every command has: errors as messages and exit codes, one JSON line for other tools."""

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pipeline.errors import Problem

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, such as train.lr=1e-4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def _allow_code(allowed: bool) -> bool:
    if allowed:
        from launch.cluster.code_folder import allow_code_here

        allow_code_here()
    return allowed


AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        callback=_allow_code,
        help="Run code from outside of mgpp that CONFIG names: data.function, model.trust_remote_code.",
    ),
]


def narrator() -> Console:
    """Return the console for progress: standard error, lines printed as they are, none wrapped."""
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on standard error."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def screen() -> Console:
    """Return the console for results: standard output, words in brackets left alone."""
    return Console(markup=False, highlight=False)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: from `mgpp stop`, a scheduler, a machine that goes down."""


class RunByDefault(TyperGroup):
    """A group of commands whose first argument may also be that of its command `run`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is meant and its arguments."""
        known = args and self.get_command(ctx, args[0]) is not None
        return super().resolve_command(ctx, args if known else ["run", *args])


_EXIT_FAILED, _EXIT_BAD_INPUT, _EXIT_STOPPED = 1, 2, 128 + 15


@contextmanager
def reported_errors(as_json: bool) -> Iterator[Any]:
    """Turn errors into messages and exit codes; with JSON keep standard output for one last line."""
    out = os.dup(1)
    if as_json:
        sys.stdout.flush()
        os.dup2(2, 1)  # whatever libraries and child processes print goes to standard error

    def emit(values: dict[str, Any]) -> None:
        if as_json:
            sys.stdout.flush()
            os.write(out, (json.dumps(values, default=str) + "\n").encode())

    from pipeline.errors import ConfigError, StageError

    try:
        yield emit
    except typer.Exit:
        raise
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        emit(
            {
                "status": "invalid",
                "errors": [str(problem) for problem in error.problems],
                "problems": [problem.as_data() for problem in error.problems],
            }
        )
        raise typer.Exit(_EXIT_BAD_INPUT) from None
    except StageError as error:
        typer.echo(f"error: {error}", err=True)
        emit({"status": "failed", "errors": [str(error)]})
        raise typer.Exit(_EXIT_FAILED) from None
    except Exception as error:  # noqa: BLE001  # the last stop before the shell
        traceback.print_exc()
        emit({"status": "failed", "errors": [f"{type(error).__name__}: {error}"]})
        raise typer.Exit(_EXIT_FAILED) from None
    except Terminated:
        emit({"status": "stopped"})
        raise typer.Exit(_EXIT_STOPPED) from None
    except KeyboardInterrupt:
        typer.echo(
            "interrupted; rerun the same command to resume from the last checkpoint", err=True
        )
        emit({"status": "interrupted"})
        raise typer.Exit(130) from None
    finally:
        os.close(out)


def raise_for(problems: list["Problem"]) -> None:
    """Raise what is wrong, if anything is."""
    from pipeline.errors import ConfigError

    if problems:
        raise ConfigError(problems)


def size_text(size: float) -> str:
    """Return a number of bytes with its unit."""
    unit = next((u for u in ("TiB", "GiB", "MiB") if size >= 2 ** (10 * _POWERS[u])), "KiB")
    return f"{size / 2 ** (10 * _POWERS[unit]):,.1f} {unit}"


_POWERS = {"KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
