"""Changes to a recipe, as campaigns give them: nested, or by dotted keys."""

import json
from collections.abc import Iterator
from typing import Any

Changes = dict[str, Any]


def overrides_of(*changes: Changes) -> tuple[str, ...]:
    """Return changes as `key=value` overrides, later ones over earlier ones, key by key."""
    leaves: Changes = {}
    for values in changes:
        leaves |= dict(_leaves(values))
    return tuple(f"{key}={json.dumps(value)}" for key, value in leaves.items())


def _leaves(changes: Changes, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
