"""The pruning methods. To add one: one file with a subclass of `Method`, one line here."""

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from mgpp.methods.base import Method, setting
from mgpp.methods.gmp import GMP
from mgpp.methods.mgpp import MGPP
from mgpp.methods.movement import Movement
from mgpp.methods.platon import PLATON
from mgpp.methods.sparse_transfer import SparseTransfer

METHODS: dict[str, type[Method]] = {
    "mgpp": MGPP,
    "gmp": GMP,
    "platon": PLATON,
    "movement": Movement,
    "sparse-transfer": SparseTransfer,
}


def settings_of(method: type[Method]) -> list[Field[Any]]:
    """Return the fields that configurations may give."""
    return [entry for entry in fields(method) if "description" in entry.metadata]


def make_method(spec: str | Mapping[str, Any], *, num_examples: int) -> Method:
    """Build a method.

    Args:
        spec: its name, or a mapping with `name` and its settings.
        num_examples: training examples of the whole run.

    Raises:
        ValueError: for a name or setting that there is not, or a value out of range.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}; allowed are {', '.join(METHODS)}")
    allowed = [entry.name for entry in settings_of(METHODS[name])]
    for key in given:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise ValueError(f"method: {key} is no setting of {name}; allowed are {known}")
    return METHODS[name](num_examples=num_examples, **given)


__all__ = [
    "GMP",
    "METHODS",
    "MGPP",
    "PLATON",
    "Method",
    "Movement",
    "SparseTransfer",
    "make_method",
    "setting",
    "settings_of",
]
