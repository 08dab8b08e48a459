"""A decoder as its layers one after the other: where they are, what each is called with, running one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.matrices import Matrix, matrices_of


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer and what is pruned of it.

    Attributes:
        module: the layer.
        matrices: what is pruned of it, by name.
    """

    module: nn.Module
    matrices: dict[str, Matrix]


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """What the model calls a layer with besides the hidden states; the same for every row."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> "LayerCall":
        """Return the call with all its tensors on a device."""
        return LayerCall(args=_to(self.args, device), kwargs=_to(self.kwargs, device))


def find_layers(model: nn.Module, names: Sequence[str]) -> list[DecoderLayer]:
    """Return the layers that hold all prunable weights, in order.

    Args:
        model: the model; on the meta device is enough.
        names: of the prunable weights.

    Raises:
        ValueError: if a weight is not that of a linear projection, or of experts, in one list of layers.
    """
    modules = dict(model.named_modules())
    matrices = {name: matrices_of(name, modules[name.rpartition(".")[0]]) for name in names}
    for path, layers in modules.items():
        # The outermost list comes first.
        if isinstance(layers, nn.ModuleList) and all(n.startswith(f"{path}.") for n in names):
            found = [DecoderLayer(module=layer, matrices={}) for layer in layers]
            for name in names:
                index = int(name.removeprefix(f"{path}.").partition(".")[0])
                found[index].matrices.update({matrix.name: matrix for matrix in matrices[name]})
            return found
    raise ValueError(
        f"{type(model).__name__} has no list of decoder layers that holds all prunable weights, from "
        f"{names[0]} to {names[-1]}"
    )


@torch.no_grad()
def layer_inputs(
    model: Any, layers: Sequence[DecoderLayer], rows: Sequence[Tensor]
) -> tuple[list[Tensor], list[LayerCall]]:
    """Return what goes into the first layer for each row, and what each layer is called with.

    The model runs on the CPU with all layers passed over, so only its embeddings do any work.

    Args:
        model: a transformers model, on the CPU.
        layers: as `find_layers` gave them.
        rows: token ids, 1-D, all of one length; at least one.

    Returns:
        By row the hidden states, [1, tokens, width]; by layer its call.

    Raises:
        ValueError: if the layers are not run once each in order, each on what the one before returned,
            or are given more of a row than its hidden states.
    """
    returned, traced = _plain, _trace(model, layers, rows[0], _plain)
    if traced is None:
        returned, traced = _in_tuple, _trace(model, layers, rows[0], _in_tuple)
    if traced is None:
        raise ValueError(
            f"{type(model).__name__} does not run its {len(layers)} layers one after the other, each on "
            "the hidden states that the one before returned"
        )
    hidden, calls = [traced[0]], traced[1]
    for row in rows[1:]:
        traced = _trace(model, layers, row, returned)
        if traced is None or not _same([vars(c) for c in traced[1]], [vars(c) for c in calls]):
            raise ValueError(
                f"the layers of {type(model).__name__} are given more of a row than its hidden states"
            )
        hidden.append(traced[0])
    return hidden, calls


def run_layer(module: nn.Module, call: LayerCall, hidden: Tensor) -> Tensor:
    """Return a layer's outputs for hidden states."""
    output = module(hidden, *call.args, **call.kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _plain(hidden: Tensor) -> Any:
    return hidden


def _in_tuple(hidden: Tensor) -> Any:
    return (hidden,)  # as the layers of Falcon, BLOOM, GPT-J and others do


def _trace(
    model: Any, layers: Sequence[DecoderLayer], row: Tensor, returned: Callable[[Tensor], Any]
) -> tuple[Tensor, list[LayerCall]] | None:
    """Run a row through the model without its layers; None if they are not a chain."""
    seen: list[tuple[int, Tensor, LayerCall]] = []
    failure = None
    with _passed_over(layers, returned, seen):
        try:
            model.base_model(input_ids=row.unsqueeze(0), use_cache=False)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            failure = error
    is_chain = [index for index, *_ in seen] == list(range(len(layers))) and all(
        hidden is seen[0][1] for _, hidden, _ in seen
    )
    if failure is not None and (is_chain or not seen):
        raise failure  # otherwise it could not continue with what was returned in a layer's stead
    return (seen[0][1], [call for *_, call in seen]) if is_chain else None


@contextmanager
def _passed_over(
    layers: Sequence[DecoderLayer], returned: Callable[[Tensor], Any], seen: list[Any]
) -> Iterator[None]:
    """Let the layers return what they are given, and write down what that is."""

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            seen.append((index, hidden, LayerCall(args=args[1:], kwargs=kwargs)))
            return returned(hidden)

        return forward

    for index, layer in enumerate(layers):
        layer.module.forward = stand_in(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)
