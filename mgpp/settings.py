"""Settings as dataclass fields that carry their description and limits."""

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from numbers import Real
from typing import Any, TypeVar

_Class = TypeVar("_Class")
_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "gt": (operator.gt, "greater than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}


def setting(default: Any, description: str, **limits: float) -> Any:
    """Declare a field of a dataclass that configurations may give.

    Args:
        default: its value unless given; a dict is copied for each instance.
        description: what it means, in one sentence or two.
        limits: `gt`, `ge`, `lt`, `le`.
    """
    metadata = {"description": description, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(entry: Field[Any]) -> Any:
    """Return the default of a field declared by `setting`."""
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def documented(cls: type[_Class]) -> type[_Class]:
    """Put the settings of a dataclass into its docstring, as its attributes."""
    text = inspect.cleandoc(cls.__doc__ or "")
    summary, separator, rest = text.partition("\n\nRaises:")
    lines = [
        f"    {entry.name}: {entry.metadata['description']}"
        for entry in fields(cls)  # type: ignore[arg-type]
        if "description" in entry.metadata
    ]
    if lines:
        summary = "\n".join([summary, "", "Attributes:", *lines])
    cls.__doc__ = f"{summary}{separator}{rest}"
    return cls


def check_number(
    name: str, value: Any, *, whole: bool = False, at_least: int | None = None
) -> None:
    """Check that a setting is a number: no boolean, no text, finite, and with `whole` a whole one.

    Raises:
        ValueError: naming the setting.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if whole and value % 1:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")


def check_limits(instance: Any) -> None:
    """Check the settings of a dataclass against their limits; None is one only by default.

    Raises:
        ValueError: naming the first that is out of range or of another type.
    """
    for entry in fields(instance):
        value, limits = getattr(instance, entry.name), entry.metadata
        if entry.type is bool and limits and not isinstance(value, bool):
            raise ValueError(f"{entry.name} must be true or false, got {value!r}")
        is_left_out = value is None and default_of(entry) is None
        limited = not is_left_out and not _LIMITS.keys().isdisjoint(limits)
        if limited:
            check_number(entry.name, value, whole=entry.type is int)
        for key, (within, words) in _LIMITS.items():
            if limited and key in limits and not within(value, limits[key]):
                share = limits.get("ge") == 0 and 1 < value <= 100
                hint = f"; it is a share: {value:g}% is {value / 100:g}" if share else ""
                raise ValueError(f"{entry.name} must be {words} {limits[key]}, got {value!r}{hint}")
