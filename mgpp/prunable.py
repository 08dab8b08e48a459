"""Which weights are prunable: patterns over parameter names, or the rule that fits transformers.

A weight is a matrix, or a stack of matrices: experts held as one parameter of three dimensions.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd

_LAYER_NUMBER = re.compile(r"\.\d+\.")
_FUSED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# "gate" and "router.layer" and "shared_expert_gate", not "gate_proj" or "gate_up_proj".
_GATE = re.compile(r"^(.*_)?(gate|gating|router)s?(_weight)?$")
_GATE_CLASS = re.compile(r"(Router|Gate|Gating)$")
_TABLE = re.compile(r"(^|_)(bias|pos|positions?|positional|embed|embeddings?|tokens?|table)(_|$)")

Shape = tuple[int, ...]


def select_prunable(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return the names of the prunable weights, in the order of `model.named_parameters()`.

    Without `include`, every matrix of the repeated layers is taken, that is of modules whose name holds a
    layer number: the weight of each linear projection (`nn.Linear`, and the `Conv1D` of GPT-2), the
    projections of `nn.MultiheadAttention`, and stacks of experts, parameters of three dimensions. In
    transformers these are the attention and feed-forward matrices. Routers and gates, embeddings,
    norms, biases, convolutions, poolers and heads are left alone, as in the paper.

    Args:
        model: the model; on the meta device is enough.
        include: shell-style patterns on full parameter names ("encoder.layer.*.weight").
        exclude: patterns of names to leave out.

    Raises:
        ValueError: if a pattern matches no parameter, names one that is not a matrix, or nothing
            is left to prune.
    """
    shapes = full_shapes(model)
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
    """Return the names of the matrices stored inputs first: `Conv1D` (GPT-2) and experts of gpt-oss."""
    shapes = full_shapes(model)
    found = set()
    for path, module in model.named_modules():
        names = {n: f"{path}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)}
        if _is_conv1d(module):
            found.add(names["weight"])
        elif _stores_inputs_first(module, {n: shapes.get(full, ()) for n, full in names.items()}):
            found |= {full for full in names.values() if len(shapes.get(full, ())) == 3}
    return frozenset(found)


def full_shapes(model: nn.Module) -> dict[str, Shape]:
    """Return the whole shape of each parameter; one that ZeRO 3 has sharded is empty itself."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def layer_matrices(model: nn.Module) -> dict[str, Shape]:
    """Return the shapes of all that might be pruned of the repeated layers, by name.

    Those are all parameters of two or more dimensions but routers and gates, embeddings, biases and
    convolutions of each channel by itself.
    """
    return {name: shape for name, _, shape in _held_in_layers(model)}


def _default_names(model: nn.Module) -> Iterator[str]:
    for name, module, shape in _held_in_layers(model):
        attribute = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            is_matrix = attribute == "weight"
        elif isinstance(module, nn.MultiheadAttention):
            is_matrix = attribute in _FUSED
        else:
            is_matrix = len(shape) == 3 and min(shape[1:]) > 1 and not isinstance(module, _ConvNd)
        if is_matrix:
            yield name


def _held_in_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Shape]]:
    """Yield name, module and shape of what `layer_matrices` returns."""
    modules = dict(model.named_modules())
    for name, shape in full_shapes(model).items():
        path, _, attribute = name.rpartition(".")
        module = modules[path]
        if len(shape) < 2 or not _LAYER_NUMBER.search(f".{path}."):
            continue
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or _TABLE.search(attribute):
            continue
        if isinstance(module, _ConvNd) and shape[1] == 1 and module.groups > 1:
            continue
        if not _is_gate(name, modules):
            yield name, module, shape


def _is_gate(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a parameter is of a router or a gate, by their names and their classes' names."""
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(map(_GATE.match, parts)) or any(
        _GATE_CLASS.search(type(modules[path]).__name__) for path in paths
    )


def _stores_inputs_first(module: nn.Module, shapes: dict[str, Shape]) -> bool:
    """Tell how a module of stacked experts stores them: as transformers notes, or by what fits."""
    noted = getattr(module, "is_transposed", None)
    if isinstance(noted, bool):
        return noted
    first, second = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
    if len(first) != 3 or len(second) != 3:
        return False
    return first[1] == second[2] and first[2] == 2 * second[1]  # [width, 2 inner], [inner, width]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _matching(pattern: str, shapes: dict[str, Shape], kind: str) -> list[str]:
    names = [name for name in shapes if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(
            f"{kind} pattern {pattern!r} matches no parameter; there are: {_some(list(shapes))}"
        )
    return names


def _some(names: list[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f", ... ({rest} more)" if rest > 0 else "")
