"""Whether the tensors of a checkpoint are the model's: only a head may be new or left over."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from pipeline.errors import ConfigError, Problem
from pipeline.models.overrides import has_fewer_layers
from pipeline.models.settings import load_model_config
from pipeline.models.source import (
    ModelConfig,
    folder_of,
    load_options,
    location_of,
    named,
    saved_config,
)
from pipeline.models.weight_files import integer_tensors

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


def match_checkpoint(
    config: ModelConfig, auto_model: str, model_kwargs: dict[str, Any], *, new_head: bool
) -> CheckpointMatch:
    """Hold a checkpoint's names, shapes and dtypes against the model's; reads no values.

    Args:
        config: which model; not of a GGUF file.
        auto_model: the transformers auto class.
        model_kwargs: what the data asks of the model (num_labels, ...).
        new_head: whether a head may be new.

    Raises:
        ConfigError: if a file is damaged, or the weights are not those of the model.
    """
    model_config = load_model_config(config, model_kwargs)
    with named(config), _quiet():
        model, info = getattr(transformers, auto_model).from_pretrained(
            location_of(config),
            config=deepcopy(model_config),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **load_options(config),
        )
        integers = integer_tensors(folder) if (folder := folder_of(config)) else []
    match = CheckpointMatch.of(model, info)
    refuse(config, match, integer_problems(integers, match, model), new_head=new_head)
    return match


def check_weights(
    config: ModelConfig,
    auto_model: str,
    model_kwargs: dict[str, Any] | None = None,
    *,
    new_head: bool,
    sharded: bool = False,
) -> None:
    """Check the weights of a model that lies on this machine, as `match_checkpoint` does.

    Args:
        config: which model.
        auto_model: the transformers auto class.
        model_kwargs: what the data asks of the model, if that is known.
        new_head: whether a head may be new.
        sharded: whether ZeRO 3 is to load them.

    Raises:
        ConfigError: if they are not those of the model.
    """
    if folder_of(config) is not None and not (config.random_init or config.gguf_file):
        kwargs = model_kwargs or {}
        match = match_checkpoint(config, auto_model, kwargs, new_head=new_head)
        if sharded:
            refuse_other_labels(config, match, kwargs)


def refuse_other_labels(
    config: ModelConfig, match: CheckpointMatch, model_kwargs: dict[str, Any]
) -> None:
    """Refuse a head of another shape under ZeRO 3: one worker would find it, the others wait.

    Raises:
        ConfigError: if the head is not for as many labels as the data has.
    """
    if match.mismatched:
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    f"the head of {config.path!r} is for another number of labels than the "
                    f"data's {model_kwargs.get('num_labels')}",
                    hint="ZeRO 3 cannot leave it out: use zero.stage: 2",
                )
            ]
        )


def has_head(config: ModelConfig, auto_model: str, *, num_labels: int) -> bool:
    """Return whether a model that lies on this machine brings all weights of a head for so many labels.

    Raises:
        ConfigError: as `match_checkpoint`.
    """
    if folder_of(config) is None or config.random_init or config.gguf_file:
        return False
    kwargs = {"num_labels": num_labels}
    return not match_checkpoint(config, auto_model, kwargs, new_head=True).new


def refuse(
    config: ModelConfig, match: CheckpointMatch, further: list[str], *, new_head: bool
) -> None:
    """Raise what is wrong with the weights of a checkpoint, if anything is."""
    fewer_layers = bool(config.overrides) and has_fewer_layers(
        load_model_config(config), saved_config(config)
    )
    found = [*match.problems(new_head=new_head, fewer_layers=fewer_layers), *further]
    hint = "model.overrides change what it is" if config.overrides else ""
    if found:
        raise ConfigError(
            Problem("model.path", f"{config.path!r} {why}", hint=hint) for why in found
        )


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting a load that is only a look at the files."""
    said = transformers.logging
    verbosity, shows_progress = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(verbosity)
        if shows_progress:
            said.enable_progress_bar()
