"""Models and tokenizers: from a folder, an installed package, a GGUF file or the hub."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from pipeline.errors import ConfigError, Problem
from pipeline.section import Section, Share
from pipeline.store.locations import content_sha256, resolve_path

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")


class ModelConfig(Section):
    """Which pretrained model."""

    path: str
    """Name on the hub, folder, `package:NAME/inner/folder` of an installed package, or `run:FILE`: what
    the run of another configuration file exported."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """Name of a GGUF file in the folder or repository; its weights are dequantized."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    attention: str | None = None
    """Attention implementation ("sdpa", "eager", "flash_attention_2"); transformers chooses."""
    overrides: dict[str, Any] = {}
    """Changes to the model's own configuration (num_hidden_layers, dropout, ...)."""
    random_init: bool = False
    """Start from random weights: only the configuration and the tokenizer are read."""
    dropout: Share | None = None
    """Dropout of hidden states and attention, where the architecture has it under a usual name."""


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
    location = _location(config)
    try:
        loaded = transformers.AutoConfig.from_pretrained(location, **_common(config))
    except (OSError, ValueError, KeyError) as error:
        raise _does_not_load(config, error) from error
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
    unknown = [name for name in config.overrides if not hasattr(loaded, name)]
    if unknown:
        raise ConfigError(
            [
                Problem(f"model.overrides.{name}", f"{loaded.model_type} has no such setting")
                for name in unknown
            ]
        )
    changes = dict(config.overrides)
    if config.dropout is not None:
        names = [name for name in _DROPOUT_NAMES if hasattr(loaded, name)]
        if not names:
            raise ConfigError(
                [Problem("model.dropout", f"{loaded.model_type} has no dropout setting")]
            )
        changes |= dict.fromkeys(names, config.dropout)
    for name, value in {**changes, **(model_kwargs or {})}.items():
        setattr(loaded, name, value)
    return loaded


def build_empty(config: ModelConfig, auto_model: str) -> nn.Module:
    """Build the model on the meta device: its parameters have names and shapes, no memory."""
    model_config = load_model_config(config)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, auto_model).from_config(
            model_config, trust_remote_code=config.trust_remote_code
        )
    return model


def load_model(
    config: ModelConfig,
    auto_model: str,
    *,
    model_kwargs: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
    zero3: dict[str, Any] | None = None,
) -> Any:
    """Load the pretrained weights; what the checkpoint lacks (a new head) is drawn from `seed`.

    Args:
        config: which model.
        auto_model: the transformers auto class.
        model_kwargs: what the data asks of the model (num_labels, ...).
        dtype: of the weights in memory.
        seed: of what is drawn.
        zero3: DeepSpeed's configuration under ZeRO 3: the weights are sharded as they are read, so
            that no worker ever holds the whole model. (GGUF files are dequantized whole first.)

    Raises:
        ConfigError: if the weights do not load.
    """
    model_config = load_model_config(config, model_kwargs)
    auto = getattr(transformers, auto_model)
    torch.manual_seed(seed)
    extra: dict[str, Any] = {"attn_implementation": config.attention} if config.attention else {}
    # transformers looks for a live object of this class while it loads.
    sharding = HfDeepSpeedConfig(zero3) if zero3 and not config.gguf_file else None
    if config.random_init:
        return auto.from_config(
            model_config, dtype=dtype, trust_remote_code=config.trust_remote_code, **extra
        )
    if _has_other_labels(config, auto, model_kwargs):
        if sharding:  # one worker would find the shapes wrong, and the others wait for it
            raise ConfigError(
                [
                    Problem(
                        "model.path",
                        f"the head of {config.path!r} is for another number of labels than the data's "
                        f"{model_kwargs['num_labels']}",
                        hint="ZeRO 3 cannot leave it out: use zero.stage: 2",
                    )
                ]
            )
        extra["ignore_mismatched_sizes"] = True  # a new head is drawn
    try:
        model, found = auto.from_pretrained(
            _location(config),
            config=model_config,
            dtype=dtype,
            output_loading_info=True,
            **_common(config),
            **extra,
        )
    except (OSError, ValueError) as error:
        raise _does_not_load(config, error) from error
    inner = [n for n, *_ in found["mismatched_keys"] if n.startswith(f"{model.base_model_prefix}.")]
    if inner:
        raise ConfigError(
            [
                Problem(
                    "model.overrides",
                    f"{min(inner)} has another shape in {config.path!r} than they ask for",
                )
            ]
        )
    _forget_the_load(model, sharded=sharding is not None, dequantized=bool(config.gguf_file))
    return model


def _does_not_load(config: ModelConfig, error: Exception) -> ConfigError:
    """Return what is said of a model that transformers cannot read."""
    reason = str(error).splitlines()[0]
    return ConfigError([Problem("model.path", f"{config.path!r} does not load: {reason}")])


def _forget_the_load(model: Any, *, sharded: bool, dequantized: bool) -> None:
    """Take from a model what transformers noted while it loaded, and would go by as it saves."""
    if sharded:
        # Here transformers notes all conversions as made, those of old names too ("LayerNorm.gamma"),
        # and would undo them as it saves; without the note it undoes what is right for the model.
        model._weight_conversions = None
    if dequantized:
        # The weights are plain tensors by now, yet transformers still takes them for quantized ones
        # and would refuse to save them.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


def _has_other_labels(config: ModelConfig, auto: Any, model_kwargs: dict[str, Any]) -> bool:
    """Tell whether the checkpoint has a head, of a task trained on before, for other labels."""
    before = load_model_config(config)
    target = auto._model_mapping.get(type(before), None)
    same_head = target is not None and target.__name__ in (before.architectures or [])
    return same_head and before.num_labels != model_kwargs.get("num_labels", before.num_labels)


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer; one without a padding token pads with its end-of-text token."""
    location = _location(config)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **_common(config))
    except (OSError, ValueError) as error:
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    f"no tokenizer in {config.path!r}: {str(error).splitlines()[0]}",
                )
            ]
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """Return what names the model's content: checksums of local files, or the hub's commit."""
    values = config.given()
    location = Path(_location(config))
    if location.exists():
        values["path"] = content_sha256(
            location / config.gguf_file if config.gguf_file else location
        )
    else:
        values["revision"] = getattr(load_model_config(config), "_commit_hash", None)
    return values


def _location(config: ModelConfig) -> str:
    try:
        return resolve_path(config.path)
    except ValueError as error:
        raise ConfigError([Problem("model.path", str(error))]) from error


def _common(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision:
        values["revision"] = config.revision
    if config.gguf_file:
        values["gguf_file"] = config.gguf_file
    return values


def _has_weights(folder: Path) -> bool:
    return any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern))
