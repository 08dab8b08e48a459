"""Where a model comes from: a folder, an installed package, a GGUF file or the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from pipeline.errors import ConfigError, DamagedFileError, Problem
from pipeline.models.weight_files import check_texts, integer_tensors
from pipeline.section import Section, Share
from pipeline.storage.hub import cached_commit, fetch_model, hub_commit, refusal
from pipeline.store.locations import content_sha256, resolve_path

# What transformers and the libraries it reads files with raise for files that are not right.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    EOFError,
    SafetensorError,
    UnpicklingError,
    StrictDataclassError,
)


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


def saved_config(config: ModelConfig) -> Any:
    """Return the model's own configuration as it was saved."""
    with named(config):
        return transformers.AutoConfig.from_pretrained(location_of(config), **load_options(config))


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """Return what names the model's content: checksums of local files, or the hub's commit."""
    values = config.given()
    location = Path(location_of(config))
    if location.exists():
        values["path"] = content_sha256(
            location / config.gguf_file if config.gguf_file else location
        )
    else:
        revision = pinned_model(config).revision
        # Offline, the copy on this machine is what is loaded.
        values["revision"] = cached_commit("model", config.path, revision)
    return values


def pinned_model(config: ModelConfig) -> ModelConfig:
    """Return a model with the commit that its revision stands for, where it is on the hub.

    Raises:
        ConfigError: if the hub does not say, which it need not in offline mode.
    """
    if Path(location_of(config)).exists():
        return config
    commit = hub_commit("model", config.path, config.revision, section="model")
    return config.model_copy(update={"revision": commit})


def fetch(config: ModelConfig) -> None:
    """Download a model of the hub to this machine, where it is not: loading it then takes no download."""
    if not Path(location_of(config)).exists():
        fetch_model(config.path, pinned_model(config).revision, config.gguf_file)


def location_of(config: ModelConfig) -> str:
    """Return what transformers loads a model from: a path, or its name on the hub.

    Raises:
        ConfigError: if it names a package that is not installed.
    """
    try:
        return resolve_path(config.path)
    except ValueError as error:
        raise ConfigError([Problem("model.path", str(error))]) from error


def folder_of(config: ModelConfig) -> Path | None:
    """Return where the model's files lie on this machine; None if only transformers knows."""
    location = Path(location_of(config))
    return location if location.is_dir() else None


def load_options(config: ModelConfig) -> dict[str, Any]:
    """Return what every `from_pretrained` of a model is called with."""
    values: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    revision = pinned_model(config).revision
    if revision:
        values["revision"] = revision
    if config.gguf_file:
        values["gguf_file"] = config.gguf_file
    return values


def attention_option(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword that chooses the attention implementation; none if transformers chooses."""
    return {"attn_implementation": config.attention} if config.attention else {}


@contextmanager
def named(config: ModelConfig) -> Iterator[None]:
    """Report a load that fails as the model's problem, with the file that is damaged, if one is."""
    try:
        yield
    except ConfigError:
        raise
    except _LOAD_ERRORS as error:
        refused = refusal("model", config.path, error)
        why = f"{config.path!r} does not load: {_reason(config, error)}"
        raise ConfigError([refused or Problem("model.path", why)]) from error


def _reason(config: ModelConfig, error: Exception) -> str:
    folder = folder_of(config)
    if folder is not None and not isinstance(error, DamagedFileError):
        try:
            check_texts(folder)
            integer_tensors(folder)
        except DamagedFileError as damage:
            return str(damage)
    return first_line(error)


def first_line(error: Exception) -> str:
    """Return an error's message in one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if not isinstance(error, KeyError) else f"{lines[0]} is missing"
