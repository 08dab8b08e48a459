"""What the files of a model hold: tensors by transformers' names, and what of the model they are made of.

`save_pretrained` renames and reshapes: weights that share memory are kept once, and experts that a model
holds as one parameter are a tensor each. It does so to a whole model in memory. Here the same functions
of transformers are given tensors without values, and what they did is read off.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from pipeline.errors import ConfigError, Problem

EXPORT_BYTES = (
    3 << 29
)  # of an export's process: Python, libraries, and the parts of tensors in its hands
_LAYER = re.compile(r"^.*?\.\d+\.")


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Tensors of a model that are written together, mostly one as one.

    Attributes:
        sources: by name in the model: parameters as `named_parameters` calls them, and buffers.
        keys: of the same, the names in the state dict that transformers keeps.
        outputs: by name in the files, in the order of their values.
        direct: whether the outputs' values, one output after the other, are the one source's in
            row-major order. Otherwise transformers computes them of the whole sources.
        buffer: whether it is no parameter.
    """

    sources: Mapping[str, Spec]
    keys: tuple[str, ...]
    outputs: Mapping[str, Spec]
    direct: bool
    buffer: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return sum(spec.nbytes for spec in self.sources.values())

    @property
    def itemsize(self) -> int:
        """Bytes of its widest number."""
        return max((spec.dtype.itemsize for spec in self.outputs.values()), default=1)

    @property
    def reshapes(self) -> bool:
        """Whether more changes than a name."""
        return list(self.outputs.values()) != list(self.sources.values())


def contents_of(model: Any) -> list[Unit]:
    """Return what `save_pretrained` would write of a model, in the model's order.

    Parameters that transformers does not save, for they are computed anew, are left out.

    Args:
        model: of transformers; sharded by ZeRO 3 or on the meta device, no values are read.

    Raises:
        ConfigError: if a parameter that is trained would not be saved.
    """
    tensors = model.state_dict(keep_vars=True)
    parameters = {id(p): name for name, p in model.named_parameters()}
    empty = {id(t): _without_values(t) for t in tensors.values()}
    state = {name: empty[id(t)] for name, t in tensors.items()}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    _check_saved(model, {id(tensors[name]) for name in state})
    state = remove_tied_weights_from_state_dict(state, model)
    names = {key: parameters.get(id(tensors[key]), key) for key in state}
    units = [
        Unit(
            sources={names[key]: _spec(state[key]) for key in group},
            keys=tuple(group),
            outputs=outputs,
            direct=direct,
            buffer=all(id(tensors[key]) not in parameters for key in group),
        )
        for group, outputs, direct in _groups(model, state)
    ]
    order = {key: index for index, key in enumerate(state)}
    return sorted(units, key=lambda unit: order[unit.keys[0]])


def export_bytes(units: Sequence[Unit]) -> int:
    """Return the memory that the export of a model takes.

    It reads the files a part at a time, unless transformers makes some parameters of several tensors each
    or the reverse: then the model is loaded whole to be compared.
    """
    whole = 0 if all(unit.direct for unit in units) else sum(unit.nbytes for unit in units)
    return EXPORT_BYTES + whole


def converted(model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that transformers saves of these, by their names in the state dict."""
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(values))
    return found


def _groups(
    model: Any, state: Mapping[str, Tensor]
) -> list[tuple[list[str], dict[str, Spec], bool]]:
    """Return which tensors are converted together, what to, and whether their values stay in order."""
    with _Uncopied():
        made = converted(model, state)
    cut: dict[int, list[str]] = {}
    for name, tensor in made.items():
        cut.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    left = {name: _spec(tensor) for name, tensor in made.items()}
    found, together = [], []
    for key, source in state.items():
        names = cut.get(source.untyped_storage()._cdata, [])
        names.sort(key=lambda name: made[name].storage_offset())
        if _in_order(source, [made[name] for name in names]):
            found.append(([key], {name: left.pop(name) for name in names}, True))
        else:
            together.append(key)
    joined = _joined(model, state, together, left)
    if joined is None:  # then all at once, as transformers does it
        outputs = {name: _spec(tensor) for name, tensor in converted(model, state).items()}
        return [(list(state), outputs, False)]
    return found + joined


def _joined(
    model: Any, state: Mapping[str, Tensor], keys: list[str], left: dict[str, Spec]
) -> list[tuple[list[str], dict[str, Spec], bool]] | None:
    """Return the groups of tensors that become one, as queries, keys and values: by layer, or all.

    Returns:
        None if these tensors, without the others, become something else.
    """
    if not keys and not left:
        return []
    layers: dict[str, list[str]] = {}
    for key in keys:
        match = _LAYER.match(key)
        layers.setdefault(match.group() if match else "", []).append(key)
    for groups in (list(layers.values()), [keys]):
        made = [_try_converted(model, {key: state[key] for key in group}) for group in groups]
        outputs = [{name: _spec(t) for name, t in (one or {}).items()} for one in made]
        if {name: spec for one in outputs for name, spec in one.items()} == left:
            return [(group, one, False) for group, one in zip(groups, outputs, strict=True)]
    return None


class _Uncopied(TorchFunctionMode):
    """Lets views stay views: conversions make what they cut out contiguous."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))


def _in_order(source: Tensor, outputs: list[Tensor]) -> bool:
    """Return whether views of a source are, one after the other, all its values in row-major order."""
    at = 0
    for output in outputs:
        if not output.is_contiguous() or output.storage_offset() != at:
            return False
        at += output.numel()
    return at == source.numel()


def _try_converted(model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Convert, or return None where transformers cannot without the others."""
    try:
        return converted(model, values)
    except Exception:  # noqa: BLE001  # its conversions raise anything
        return None


def _without_values(tensor: Tensor) -> Tensor:
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")


def _spec(tensor: Tensor) -> Spec:
    return Spec(tensor.dtype, tuple(tensor.shape))


def _check_saved(model: Any, saved: Collection[int]) -> None:
    problems = [
        Problem("train.freeze", f"transformers does not save {name}, so it must be among these")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in saved
    ]
    if problems:
        raise ConfigError(problems)
