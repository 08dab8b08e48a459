"""Which weights are prunable: patterns over parameter names, or the rule that fits transformers."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

_LAYER_NUMBER = re.compile(r"\.\d+\.")


def select_prunable(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return the names of the prunable weights, in the order of `model.named_parameters()`.

    Without `include`, every matrix of the repeated layers is taken: the weight of each linear
    projection (`nn.Linear`, and the `Conv1D` of GPT-2) whose name holds a layer number. In
    transformers these are the attention and feed-forward matrices; embeddings, norms, biases,
    poolers and heads are left alone, as in the paper.

    Args:
        model: the model; on the meta device is enough.
        include: shell-style patterns on full parameter names ("encoder.layer.*.weight").
        exclude: patterns of names to leave out.

    Raises:
        ValueError: if a pattern matches no parameter, names one that is not a matrix, or nothing
            is left to prune.
    """
    # A parameter that ZeRO 3 has sharded is empty itself and keeps its shape beside it.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    excluded = {n for pattern in exclude for n in _matching(pattern, shapes, "exclude")}
    selected = set(_default_names(model)) if not include else set()
    for pattern in include:
        selected |= set(_matching(pattern, shapes, "include"))
    selected -= excluded
    vectors = [name for name in shapes if name in selected and len(shapes[name]) < 2]
    if vectors:
        raise ValueError(
            f"the include patterns also take {vectors[0]!r} of shape {shapes[vectors[0]]}: only "
            "matrices are prunable; narrow the patterns or exclude it"
        )
    if not selected:
        raise ValueError(
            "no weight is left to prune; the model's matrices are: "
            + _some([name for name, shape in shapes.items() if len(shape) > 1])
        )
    return [name for name in shapes if name in selected]


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the matrices stored inputs first: those of `Conv1D` (GPT-2)."""
    return frozenset(
        f"{name}.weight" for name, module in model.named_modules() if _is_conv1d(module)
    )


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _default_names(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        is_projection = isinstance(module, nn.Linear) or _is_conv1d(module)
        if is_projection and _LAYER_NUMBER.search(f".{name}."):
            yield f"{name}.weight"


def _matching(pattern: str, shapes: dict[str, tuple[int, ...]], kind: str) -> list[str]:
    names = [name for name in shapes if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(
            f"{kind} pattern {pattern!r} matches no parameter; there are: {_some(list(shapes))}"
        )
    return names


def _some(names: list[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", ... ({rest} more)" if rest > 0 else "")
