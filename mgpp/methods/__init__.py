"""The pruning methods. To add one: one file with a subclass of `Method`, one line here.

Those of ONE_SHOT, subclasses of `OneShotMethod`, prune a model once and train nothing.
"""

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar

from mgpp.methods.base import Method
from mgpp.methods.gmp import GMP
from mgpp.methods.mgpp import MGPP
from mgpp.methods.mgpp_saliency import MGPPSaliency
from mgpp.methods.movement import Movement
from mgpp.methods.one_shot.base import OneShotMethod, PrunedMatrix
from mgpp.methods.one_shot.sparsegpt import SparseGPT
from mgpp.methods.one_shot.wanda import Wanda
from mgpp.methods.pins import PINS
from mgpp.methods.platon import PLATON
from mgpp.methods.soft_movement import SoftMovement
from mgpp.methods.sparse_transfer import SparseTransfer
from mgpp.settings import documented, setting

_Kind = TypeVar("_Kind", Method, OneShotMethod)

METHODS: dict[str, type[Method]] = {
    "mgpp": MGPP,
    "mgpp-saliency": MGPPSaliency,
    "gmp": GMP,
    "platon": PLATON,
    "movement": Movement,
    "soft-movement": SoftMovement,
    "pins": PINS,
    "sparse-transfer": SparseTransfer,
}

ONE_SHOT: dict[str, type[OneShotMethod]] = {
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}

for _method in (*METHODS.values(), *ONE_SHOT.values()):
    documented(_method)


def settings_of(method: type[Any]) -> list[Field[Any]]:
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
    method, given = _look_up(spec, METHODS)
    return method(num_examples=num_examples, **given)


def make_one_shot(spec: str | Mapping[str, Any], *, pattern: str | None = None) -> OneShotMethod:
    """Build a one-shot method.

    Args:
        spec: its name, or a mapping with `name` and its settings.
        pattern: "N:M", or None for single weights.

    Raises:
        ValueError: for a name or setting that there is not, or a value out of range.
    """
    method, given = _look_up(spec, ONE_SHOT)
    return method(pattern=pattern, **given)


def _look_up(
    spec: str | Mapping[str, Any], registry: Mapping[str, type[_Kind]]
) -> tuple[type[_Kind], dict[str, Any]]:
    given: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"method: got {name!r}; allowed are {', '.join(registry)}")
    allowed = [entry.name for entry in settings_of(registry[name])]
    for key in given:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise ValueError(f"method: {key} is no setting of {name}; allowed are {known}")
    return registry[name], given


__all__ = [
    "GMP",
    "METHODS",
    "MGPP",
    "ONE_SHOT",
    "PINS",
    "PLATON",
    "MGPPSaliency",
    "Method",
    "Movement",
    "OneShotMethod",
    "PrunedMatrix",
    "SoftMovement",
    "SparseGPT",
    "SparseTransfer",
    "Wanda",
    "make_method",
    "make_one_shot",
    "setting",
    "settings_of",
]
