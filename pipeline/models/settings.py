"""A model's own configuration, with the overrides of a run, and the empty model that it makes."""

import shlex
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mgpp.sparse.reading import QUANT_METHOD
from pipeline.errors import ConfigError, Problem
from pipeline.models.overrides import apply_overrides
from pipeline.models.source import ModelConfig, attention_option, location_of, saved_config

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")
_DROPOUT_NAMES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "dropout_rate",
)


def load_model_config(config: ModelConfig, model_kwargs: dict[str, Any] | None = None) -> Any:
    """Return the model's own configuration, with overrides applied.

    Args:
        config: which model.
        model_kwargs: what the data asks of the model (num_labels, ...).

    Raises:
        ConfigError: if it cannot be read, or an override names what it does not have.
    """
    location = location_of(config)
    loaded = saved_config(config)
    if not config.random_init and Path(location).is_dir() and not _has_weights(Path(location)):
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    f"{config.path!r} has no weights ({', '.join(_WEIGHT_FILES)})",
                    hint="model.random_init starts without",
                )
            ]
        )
    method = getattr(loaded, "quantization_config", None)
    if method is not None and not config.gguf_file:
        method = method if isinstance(method, dict) else vars(method)
        raise ConfigError([_quantized(config.path, method.get("quant_method", "unknown"))])
    _override(loaded, config)
    for name, value in (model_kwargs or {}).items():
        setattr(loaded, name, value)
    return loaded


def _quantized(path: str, method: str) -> Problem:
    if method == QUANT_METHOD:
        why = f"{path!r} is packed: a run starts from the plain checkpoint"
        hint = f"`mgpp unpack {shlex.quote(path)} FOLDER`, then model.path=FOLDER"
        return Problem("model.path", why, hint=hint)
    why = f"{path!r} is quantized ({method}): its weights can be neither trained nor pruned"
    return Problem("model.path", why, hint="use the model it was made of")


def _override(loaded: Any, config: ModelConfig) -> None:
    """Apply the overrides and the dropout to a model's own configuration.

    Raises:
        ConfigError: if it does not have such a setting, or another of its settings contradicts one.
    """
    problems = apply_overrides(loaded, config.overrides)
    if problems:
        raise ConfigError(problems)
    if config.dropout is None:
        return
    text = loaded.get_text_config()
    names = [name for name in _DROPOUT_NAMES if hasattr(text, name)]
    if not names:
        raise ConfigError([Problem("model.dropout", f"{loaded.model_type} has no dropout setting")])
    for name in names:
        setattr(text, name, config.dropout)


def build_empty(config: ModelConfig, auto_model: str) -> nn.Module:
    """Build the model on the meta device: its parameters have names and shapes, no memory.

    Raises:
        ConfigError: if it cannot be built, in the words of its own code.
    """
    model_config = load_model_config(config)
    try:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, auto_model).from_config(
                model_config,
                trust_remote_code=config.trust_remote_code,
                **attention_option(config),
            )
    except Exception as error:  # a model's code raises anything for settings that do not fit
        kind = auto_model.removeprefix("AutoModelFor")
        why = f"{config.path!r} cannot be built as a {kind} model: {_build_reason(error)}"
        hint = "model.overrides change what it is" if config.overrides else ""
        key = "model.attention" if config.attention else "model.path"
        raise ConfigError([Problem(key, why, hint=hint)]) from error
    return model


def _build_reason(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (
        line
        if isinstance(error, ValueError | ImportError) and line
        else (f"{type(error).__name__}: {line}".removesuffix(": "))
    )


def _has_weights(folder: Path) -> bool:
    return any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern))
