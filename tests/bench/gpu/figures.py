"""A figure or a check, and the limit it must keep."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was found of one thing.

    Attributes:
        key: its name, one of its own.
        text: what it is.
        value: a number, or whether a check passed; None where it can be had on a device alone.
        limit: the most or the least a number may be ("<= 12"); None where it is only reported.
        of_device: a number that says something of a device alone: its limit is not held in a dry run.
        detail: why a check failed.
    """

    key: str
    text: str
    value: float | bool | None
    limit: str | None = None
    of_device: bool = False
    detail: str = ""

    def is_kept(self, dry_run: bool) -> bool | None:
        """Tell whether it keeps its limit; None where there is none to keep."""
        if isinstance(self.value, bool):
            return self.value
        if self.value is None or self.limit is None or (self.of_device and dry_run):
            return None
        sign, limit = self.limit.split()
        return self.value <= float(limit) if sign == "<=" else self.value >= float(limit)

    def shown(self) -> str:
        """Return the value as a table has it."""
        if self.value is None:
            return "needs a device"
        if isinstance(self.value, bool):
            return "passed" if self.value else "FAILED"
        return f"{self.value:,.4g}" if abs(self.value) < 100 else f"{self.value:,.0f}"

    def row(self, dry_run: bool) -> tuple[str, str, str, str]:
        """Return key, text, value and limit, the latter with a note if it is broken."""
        kept = self.is_kept(dry_run)
        limit = self.limit or ""
        if kept is None and limit:
            limit += "  not held"
        return self.key, self.text, self.shown(), limit if kept is not False else f"{limit}  BROKEN"

    def record(self, dry_run: bool) -> dict[str, Any]:
        """Return what is written down."""
        return {**vars(self), "kept": self.is_kept(dry_run)}


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as plain text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
