"""Whether the tensors of a checkpoint are the model's: only a head may be new or left over."""

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_LAYER_NUMBER = re.compile(r"\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class CheckpointMatch:
    """How a checkpoint's tensors fit a model.

    Attributes:
        missing: names of the model's weights that the checkpoint lacks.
        unexpected: names of the checkpoint's tensors that the model has no place for.
        mismatched: by name of the weight, its shape in the checkpoint and in the model.
        head: names of the model's weights outside its base model, and of poolers: what a new task brings.
        inner: first parts of names inside the base model.
        prefix: of these names, where the base model has a name of its own.
        holders: names of the modules that hold the base model's weights, without its own name, and with
            "*" for the numbers of layers.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    head: frozenset[str]
    inner: frozenset[str]
    prefix: str
    holders: frozenset[str]

    @classmethod
    def of(cls, model: Any, info: Mapping[str, Any]) -> "CheckpointMatch":
        """Read what transformers reports of a load (`output_loading_info`)."""
        buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
        return cls(
            missing=sorted(info["missing_keys"]),
            unexpected=sorted(
                name for name in info["unexpected_keys"] if name.rpartition(".")[2] not in buffers
            ),
            mismatched={
                name: (tuple(found), tuple(wanted))
                for name, found, wanted in sorted(info["mismatched_keys"])
            },
            head=frozenset(head_names(model)),
            inner=frozenset(_inner_parts(model)),
            prefix=f"{model.base_model_prefix}.",
            holders=frozenset(_holders(model)),
        )

    @property
    def new(self) -> list[str]:
        """The weights that are drawn: those missing and those of another shape."""
        return sorted({*self.missing, *self.mismatched})

    def problems(self, *, new_head: bool, fewer_layers: bool) -> list[str]:
        """Return why the model must not be trained or scored with these weights.

        Args:
            new_head: whether a head may be new.
            fewer_layers: whether the model was asked to have fewer layers than the checkpoint.
        """
        allowed = self.head if new_head else frozenset()
        found = []
        absent = [name for name in self.missing if name not in allowed]
        if absent:
            only = "; only a head may be new" if new_head else "; none may be new"
            found.append(f"lacks {_counted(absent, 'weight')} of the model{only}")
        for name, (shape, wanted) in self.mismatched.items():
            if name not in allowed:
                found.append(f"holds {name} of shape {shape}, the model's is {wanted}")
                break
        extra = [
            name
            for name in self.unexpected
            if self._is_of_a_weight(name)
            and not (fewer_layers and _LAYER_NUMBER.search(f".{name}."))
        ]
        if extra:
            found.append(f"holds {_counted(extra, 'tensor')} that the model has no place for")
        return found

    @property
    def left_over(self) -> list[str]:
        """Tensors of the base model that this model has no module for: old buffers, a decoder."""
        return [n for n in self.unexpected if self._is_inner(n) and not self._is_of_a_weight(n)]

    def _is_of_a_weight(self, name: str) -> bool:
        """Tell whether a tensor belongs to a module that holds weights, in whatever layer."""
        parts = _NUMBER.sub("*", name.removeprefix(self.prefix)).split(".")
        paths = {".".join(parts[:end]) for end in range(1, len(parts))}
        return self._is_inner(name) and not paths.isdisjoint(self.holders)

    def _is_inner(self, name: str) -> bool:
        return not _is_pooler(name) and any(name.startswith(part) for part in self.inner)


def head_names(model: Any) -> list[str]:
    """Return the names of the weights that a task brings: outside the base model, and its pooler."""
    base = model.base_model
    if base is model:  # no base model of its own, as T5: what predicts tokens
        output = model.get_output_embeddings()
        inside = {id(p) for p in model.parameters()}
        inside -= {id(p) for p in output.parameters()} if output is not None else set()
    else:
        inside = {id(p) for p in base.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, p in named if id(p) not in inside or _is_pooler(name)]


def first_not_finite(model: nn.Module) -> str | None:
    """Return the name of the first weight with a value that is not finite, None if there is none.

    Under ZeRO 3 weights are gathered one by one, so all workers must call, and find the same.
    """
    for name, parameter in model.named_parameters():
        with gathered([parameter], modified=False), torch.no_grad():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                return name
    return None


def integer_problems(names: Collection[str], match: CheckpointMatch, model: Any) -> list[str]:
    """Return what is wrong with a checkpoint's tensors of whole numbers: weights are none.

    Args:
        names: of these tensors.
        match: how the checkpoint fits.
        model: the model; on the meta device is enough.
    """
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    wrong = [
        name
        for name in names
        if name not in match.unexpected
        and name.rpartition(".")[2] not in {*buffers, "position_ids"}
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    return [f"holds {_counted(wrong, 'weight')} in whole numbers"] if wrong else []


def gathered(parameters: list[nn.Parameter], *, modified: bool) -> Any:
    """Return a context in which parameters are whole; what is modified there is kept on all workers."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modified else None)


def _inner_parts(model: Any) -> Iterable[str]:
    prefix = model.base_model_prefix
    if model.base_model is not model:
        yield f"{prefix}."
    for name, _ in model.base_model.named_children():
        if name != "lm_head":
            yield f"{name}."


def _holders(model: Any) -> Iterable[str]:
    prefix = f"{model.base_model_prefix}."
    for name, _ in model.named_parameters(remove_duplicate=False):
        path = name.removeprefix(prefix).rpartition(".")[0]
        if path:
            yield _NUMBER.sub("*", path)


def _is_pooler(name: str) -> bool:
    return "pooler" in name.split(".")


def _counted(names: list[str], what: str) -> str:
    if len(names) == 1:
        return f"the {what} {names[0]}"
    return f"{len(names)} {what}s, the first {names[0]},"
