"""What every command has: arguments, where it prints, how it writes numbers."""

from collections.abc import Iterable
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


class RunByDefault(TyperGroup):
    """A group of commands whose first argument may also be that of its command `run`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is meant and its arguments."""
        known = args and self.get_command(ctx, args[0]) is not None
        return super().resolve_command(ctx, args if known else ["run", *args])


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
