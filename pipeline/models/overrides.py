"""Changes to a model's own configuration: nested ones too, and what contradicts them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from pipeline.errors import Problem

_KEY = "model.overrides"
_LAYERS = re.compile(r"layers?$|layers?_|_groups$|block_sizes$|^depths?$")
# Settings that not every configuration writes down, though every model may have them.
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# What configurations raise for values that do not go.
_REFUSALS = (
    StrictDataclassError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
)
_DECIDED = {
    "model_type": "the checkpoint decides it",
    "architectures": "the task decides it",
    "num_labels": "the data's labels decide it",
    "id2label": "the data's labels decide it",
    "label2id": "the data's labels decide it",
    "problem_type": "the task decides it",
    "dtype": "zero.precision decides it",
    "torch_dtype": "zero.precision decides it",
    "quantization_config": "quantized weights can be neither trained nor pruned",
    "auto_map": "the checkpoint decides it",
    "transformers_version": "the checkpoint decides it",
}


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
    known = {*settings.to_dict(), *settings.attribute_map, *_TOKENS} - _DECIDED.keys()
    problems = []
    for name, value in changes.items():
        if name in _DECIDED:
            problems.append(Problem(f"{key}.{name}", _DECIDED[name], hint="leave it out"))
            continue
        if name not in known:
            problems.append(_unknown(settings, name, key))
            continue
        inner = getattr(settings, name, None)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            problems += apply_overrides(inner, value, f"{key}.{name}")
            continue
        if _is_negative_size(name, inner, value):
            problems.append(Problem(f"{key}.{name}", "must not be negative", got=value))
            continue
        try:
            setattr(settings, name, value)
        except _REFUSALS as error:
            why = " ".join(str(error).split())
            problems.append(Problem(f"{key}.{name}", why, got=value))
    return problems or _contradictions(settings, changes, before, key)


def has_fewer_layers(settings: Any, before: Any) -> bool:
    """Tell whether a configuration, or one that lies nested in it, has fewer layers than before."""
    counts = dict(_layer_counts(before, ""))
    return any(
        count < counts.get(name, 0) for name, count in _layer_counts(settings, "") if name in counts
    )


def _layer_counts(settings: Any, path: str) -> Iterator[tuple[str, int]]:
    for name, value in vars(settings).items():
        if isinstance(value, PretrainedConfig):
            yield from _layer_counts(value, f"{path}{name}.")
        elif _LAYERS.search(name) and isinstance(value, int) and not isinstance(value, bool):
            yield f"{path}{name}", value
        elif _LAYERS.search(name) and isinstance(value, list):
            numbers = all(isinstance(number, int) for number in value)
            yield f"{path}{name}", sum(value) if numbers else len(value)


def _is_negative_size(name: str, before: Any, value: Any) -> bool:
    """Tell whether a size or count would be negative; numbers of tokens may be, for none."""
    sizes = all(isinstance(given, int) for given in (before, value))
    return sizes and before > 0 > value and not name.endswith("_id")


def _unknown(settings: Any, name: str, key: str) -> Problem:
    inner = [
        f"{key}.{outer}.{name}"
        for outer, value in vars(settings).items()
        if isinstance(value, PretrainedConfig) and name in {*value.to_dict(), *value.attribute_map}
    ]
    hint = f"it has {' and '.join(inner)}" if inner else ""
    return Problem(f"{key}.{name}", f"{settings.model_type} has no such setting", hint=hint)


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
