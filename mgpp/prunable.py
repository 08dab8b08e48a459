"""Which weights are prunable: patterns over parameter names, or the rule that fits transformers.

A weight is a matrix, or a stack of matrices: experts held as one parameter of three dimensions.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FUSED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# "router.layer", "modality_router"; whatever is inside is of the router too.
_ROUTER = re.compile(r"(^|_)routers?(_weight)?$")
_ROUTER_CLASS = re.compile(r"Router$")
# "gate" and "shared_expert_gate", not "gate_proj" or "gate_up_proj".
_GATE = re.compile(r"^(.*_)?(gate|gating)s?(_weight)?$")
_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_TABLE = re.compile(r"(^|_)(bias|pos|positions?|positional|embed|embeddings?|tokens?|table)(_|$)")
_TOKENS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
)  # a model's inputs, where they are text

Shape = tuple[int, ...]


def select_prunable(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return the names of the prunable weights, in the order of `model.named_parameters()`.

    Without `include`, every matrix of the repeated layers is taken, that is of the modules of an
    `nn.ModuleList`, or of another container whose modules are all of one class: the weight of each linear
    projection (`nn.Linear`, and the `Conv1D` of GPT-2), the projections of `nn.MultiheadAttention`, and
    stacks of experts, parameters of three dimensions. In transformers these are the attention and
    feed-forward matrices. Routers, gates of a few outputs (one, or one a head or expert), embeddings,
    norms, biases, convolutions, poolers and heads are left alone, as in the paper; so are, in a model of
    texts, its towers for images and sounds, which texts alone never reach.

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
        patterns = patterns_of(name for name in layer_matrices(model) if name not in excluded)
        raise ValueError(
            f"no weight is left to prune; to prune the matrices of the layers, set include: {patterns}"
            if patterns and not include
            else "no weight is left to prune; the model's matrices are: "
            + _some([name for name, shape in shapes.items() if len(shape) > 1])
        )
    return [name for name in shapes if name in selected]


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of the matrices stored inputs first: `Conv1D` (GPT-2) and experts of gpt-oss."""
    modules, shapes = dict(model.named_modules()), full_shapes(model)
    return frozenset(name for name in shapes if _stores_inputs_first(name, modules, shapes))


def check_known(
    model: nn.Module, names: Iterable[str], *, pattern: bool, by_matrix: str | None
) -> None:
    """Check that of weights of three dimensions is known what a placement of the zeros goes by.

    Args:
        model: the model; on the meta device is enough.
        names: of the prunable weights.
        pattern: whether zeros have a structure along inputs or outputs.
        by_matrix: name of the setting that treats every matrix by itself; None if none does.

    Raises:
        ValueError: naming the setting, and the weight that is no stack of experts, or of which nothing
            says whether inputs or outputs come first.
    """
    modules, shapes = dict(model.named_modules()), full_shapes(model)
    setting = "pattern" if pattern else by_matrix
    for name in names if setting else ():
        if len(shapes[name]) < 3:
            continue
        if not _is_stack(name, modules, shapes[name]):
            raise ValueError(
                f"{setting}: {name} of shape {shapes[name]} is no stack of experts, so that nothing says "
                "what its matrices are; exclude it, or leave the setting out"
            )
        if pattern and _stores_inputs_first(name, modules, shapes) is None:
            raise ValueError(
                f"pattern: nothing says whether inputs or outputs come first in {name} of shape "
                f"{shapes[name]}; exclude it, or leave the pattern out"
            )


def patterns_of(names: Iterable[str]) -> list[str]:
    """Return patterns of names, with "*" for the numbers of layers, each once."""
    return list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))


def full_shapes(model: nn.Module) -> dict[str, Shape]:
    """Return the whole shape of each parameter; one that ZeRO 3 has sharded is empty itself."""
    return {name: _shape(p) for name, p in model.named_parameters()}


def layer_matrices(model: nn.Module) -> dict[str, Shape]:
    """Return the shapes of all that might be pruned of the repeated layers, by name.

    Those are all parameters of two or more dimensions but routers and gates, embeddings, biases,
    convolutions of each channel by itself, and towers that texts never reach.
    """
    return {name: shape for name, _, shape in _held_in_layers(model)}


def _default_names(model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules())
    for name, module, shape in _held_in_layers(model):
        attribute = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            is_matrix = attribute == "weight"
        elif isinstance(module, nn.MultiheadAttention):
            is_matrix = attribute in _FUSED
        else:
            is_matrix = _is_stack(name, modules, shape)
        if is_matrix:
            yield name


def _held_in_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Shape]]:
    """Yield name, module and shape of what `layer_matrices` returns."""
    modules = dict(model.named_modules())
    choices, towers = _numbers_of_choices(modules), towers_of(model)
    for name, shape in full_shapes(model).items():
        path, _, attribute = name.rpartition(".")
        module = modules[path]
        if len(shape) < 2 or not _is_in_layer(path, modules) or path.startswith(towers):
            continue
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or _TABLE.search(attribute):
            continue
        if isinstance(module, _ConvNd) and shape[1] == 1 and module.groups > 1:
            continue
        if not _is_gate(name, shape, modules, choices):
            yield name, module, shape


def _is_in_layer(path: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a module is of a repeated layer: numbered in a list, or among modules of its class."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            holder = modules[".".join(parts[:i])]
            classes = {type(child) for child in holder.children()}
            if isinstance(holder, nn.ModuleList) or len(classes) == 1:
                return True
    return False


def towers_of(model: Any) -> tuple[str, ...]:
    """Return the beginnings of the names in a model of texts that belong to inputs of other kinds.

    As transformers notes them (`main_input_name`, `input_modalities`); what holds the embeddings of
    tokens is none.

    Args:
        model: the model; on the meta device is enough.

    Returns:
        Names of modules, each with a point at its end ("model.vision_tower.").
    """
    if not hasattr(model, "get_input_embeddings") or not _takes_text(model):
        return ()
    try:
        embeddings = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # transformers knows of none: CANINE, Perceiver
        embeddings = None
    return tuple(
        f"{path}."
        for path, module in model.named_modules()
        if not _takes_text(module) and all(m is not embeddings for m in module.modules())
    )


def _takes_text(module: Any) -> bool:
    named = getattr(module, "main_input_name", "input_ids")
    return named in _TOKENS and "text" in (getattr(module, "input_modalities", None) or "text")


def _numbers_of_choices(modules: dict[str, nn.Module]) -> set[int]:
    """Return how many outputs a gate may have: one, or one for each head or expert."""
    found = {1}
    for path, module in modules.items():
        heads = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads"))
        found |= {number for number in heads if isinstance(number, int)}
        if _EXPERTS.search(path.rpartition(".")[2]):
            if isinstance(module, nn.ModuleList):
                found.add(len(module))
            held = module.named_parameters(recurse=False)
            found |= {_shape(p)[0] for _, p in held if len(_shape(p)) == 3}
    return found


def _is_gate(name: str, shape: Shape, modules: dict[str, nn.Module], choices: set[int]) -> bool:
    """Tell whether a parameter is of a router, or of a gate with as many outputs as there are choices.

    Many a matrix between hidden states is called a gate too (Gemma 3n, MiniMax, xLSTM).
    """
    parts = name.split(".")
    paths = [".".join(parts[:i]) for i in range(1, len(parts))]
    if any(map(_ROUTER.search, parts)) or any(
        _ROUTER_CLASS.search(type(modules[path]).__name__) for path in paths
    ):
        return True
    for i, part in enumerate(parts):
        if not _GATE.match(part):
            continue
        beside = modules[".".join(parts[:i])].named_children()
        if part in ("gate", "gating") and any(_EXPERTS.search(child) for child, _ in beside):
            return True
        outputs = shape[-1] if _is_conv1d(modules[paths[-1]]) else shape[0]
        if len(shape) == 2 and outputs in choices:
            return True
    return False


def _is_stack(name: str, modules: dict[str, nn.Module], shape: Shape) -> bool:
    """Tell whether a parameter is a stack of experts, by its names and its class's name."""
    if len(shape) != 3 or min(shape[1:]) == 1:
        return False
    path = name.rpartition(".")[0]
    module = modules[path]
    return not isinstance(module, _ConvNd) and bool(
        isinstance(getattr(module, "is_transposed", None), bool)
        or _EXPERTS.search(type(module).__name__)
        or _EXPERTS.search(name)
    )


def _stores_inputs_first(
    name: str, modules: dict[str, nn.Module], shapes: dict[str, Shape]
) -> bool | None:
    """Tell whether a weight is stored inputs first: by its class, as transformers notes, or by what fits.

    Returns:
        None for a stack of experts of which nothing says it.
    """
    path = name.rpartition(".")[0]
    module = modules[path]
    if _is_conv1d(module):
        return name.endswith("weight")
    if not _is_stack(name, modules, shapes[name]):
        return False
    noted = getattr(module, "is_transposed", None)
    if isinstance(noted, bool):
        return noted
    up, down = (shapes.get(f"{path}.{n}".lstrip("."), ()) for n in ("gate_up_proj", "down_proj"))
    fits = None
    if len(up) == len(down) == 3:
        inputs_first = up[1] == down[2] and up[2] == 2 * down[1]  # [width, 2 inner], [inner, width]
        outputs_first = up[2] == down[1] and up[1] == 2 * down[2]
        fits = inputs_first if inputs_first != outputs_first else None
    elif type(module).__name__.endswith("ParallelExperts"):  # of JetMoe, run by `functional.linear`
        fits = False
    return fits


def _shape(parameter: nn.Parameter) -> Shape:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # whole, under ZeRO 3 too


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
