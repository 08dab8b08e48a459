"""Changes to a model's own configuration: nested ones too, and what contradicts them."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from pipeline.errors import Problem

_KEY = "model.overrides"


def apply_overrides(settings: Any, changes: Mapping[str, Any], key: str = _KEY) -> list[Problem]:
    """Change a model's configuration in place; a mapping changes the configuration of that name in it.

    Args:
        settings: the configuration.
        changes: values by name.
        key: what the changes are called.

    Returns:
        A problem for each name it does not have, each value of another kind, and each list of one entry a
        layer that is left at another number of layers.
    """
    before = getattr(settings, "num_hidden_layers", None)
    problems = []
    for name, value in changes.items():
        if not hasattr(settings, name):
            problems.append(Problem(f"{key}.{name}", f"{settings.model_type} has no such setting"))
            continue
        inner = getattr(settings, name)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            problems += apply_overrides(inner, value, f"{key}.{name}")
            continue
        try:
            setattr(settings, name, value)
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            why = " ".join(str(error).split())
            problems.append(Problem(f"{key}.{name}", why, got=value))
    return problems or _contradictions(settings, changes, before, key)


def _contradictions(
    settings: Any, changes: Mapping[str, Any], before: Any, key: str
) -> list[Problem]:
    """Return the lists of one entry a layer that do not go with the number of layers."""
    layers = getattr(settings, "num_hidden_layers", None)
    if not isinstance(layers, int) or not changes:
        return []
    return [
        Problem(
            f"{key}.{name}",
            f"a list of {len(value)} does not go with {layers} layers",
            hint=f"give {key}.{name} for {layers} layers, or leave the number of layers",
        )
        for name, value in vars(settings).items()
        if "layer" in name
        and isinstance(value, list)
        and len(value) != layers
        and (len(value) == before or name in changes)
    ]
