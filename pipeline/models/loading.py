"""Models and tokenizers: from a folder, an installed package, a GGUF file or the hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from pipeline.errors import ConfigError, Problem
from pipeline.models.checkpoint_check import (
    CheckpointMatch,
    first_not_finite,
    integer_problems,
)
from pipeline.models.labels import follow_labels
from pipeline.models.overrides import apply_overrides, has_fewer_layers
from pipeline.models.passed_over import gather_experts_whole
from pipeline.models.weight_files import DamagedFileError, check_texts, integer_tensors
from pipeline.section import Section, Share
from pipeline.store.hub import cached_commit, fetch_model, hub_commit, refusal
from pipeline.store.locations import content_sha256, resolve_path
from pipeline.worker_group import WorkerGroup

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
    loaded = _saved_config(config)
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
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    f"{config.path!r} is quantized ({method.get('quant_method', 'unknown')}): its "
                    "weights can be neither trained nor pruned",
                    hint="use the model it was made of",
                )
            ]
        )
    _override(loaded, config)
    for name, value in (model_kwargs or {}).items():
        setattr(loaded, name, value)
    return loaded


def _saved_config(config: ModelConfig) -> Any:
    """Return the model's own configuration as it was saved."""
    with _named(config):
        return transformers.AutoConfig.from_pretrained(_location(config), **_common(config))


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
                **_attention(config),
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
    with _named(config), _quiet():
        model, info = getattr(transformers, auto_model).from_pretrained(
            _location(config),
            config=deepcopy(model_config),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_common(config),
        )
        integers = integer_tensors(folder) if (folder := _folder(config)) else []
    match = CheckpointMatch.of(model, info)
    _refuse(config, match, integer_problems(integers, match, model), new_head=new_head)
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
    if _folder(config) is not None and not (config.random_init or config.gguf_file):
        kwargs = model_kwargs or {}
        match = match_checkpoint(config, auto_model, kwargs, new_head=new_head)
        if sharded:
            _refuse_other_labels(config, match, kwargs)


def _refuse_other_labels(
    config: ModelConfig, match: CheckpointMatch, model_kwargs: dict[str, Any]
) -> None:
    """Refuse a head of another shape under ZeRO 3: one worker would find it, the others wait."""
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
    if _folder(config) is None or config.random_init or config.gguf_file:
        return False
    kwargs = {"num_labels": num_labels}
    return not match_checkpoint(config, auto_model, kwargs, new_head=True).new


def _refuse(
    config: ModelConfig, match: CheckpointMatch, further: list[str], *, new_head: bool
) -> None:
    """Raise what is wrong with the weights of a checkpoint, if anything is."""
    fewer_layers = bool(config.overrides) and has_fewer_layers(
        load_model_config(config), _saved_config(config)
    )
    found = [*match.problems(new_head=new_head, fewer_layers=fewer_layers), *further]
    hint = "model.overrides change what it is" if config.overrides else ""
    if found:
        raise ConfigError(
            Problem("model.path", f"{config.path!r} {why}", hint=hint) for why in found
        )


def load_model(
    config: ModelConfig,
    auto_model: str,
    *,
    model_kwargs: dict[str, Any],
    dtype: torch.dtype | Literal["auto"],
    seed: int,
    zero3: dict[str, Any] | None = None,
    new_head: bool = True,
    workers: WorkerGroup | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Any:
    """Load the pretrained weights; what the checkpoint lacks, which is a head, is drawn from `seed`.

    A head for labels of the same names in another order gets its rows in the data's order.

    Args:
        config: which model.
        auto_model: the transformers auto class.
        model_kwargs: what the data asks of the model (num_labels, ...).
        dtype: of the weights in memory; "auto" for that of the files.
        seed: of what is drawn.
        zero3: DeepSpeed's configuration under ZeRO 3: the weights are sharded as they are read, so
            that no worker ever holds the whole model. (GGUF files are dequantized whole first.)
        new_head: whether a head may be drawn; False for a model that was trained already.
        workers: all of them, who call this function and refuse alike; None for this process alone.
        notify: called with a note on which weights were drawn.

    Raises:
        ConfigError: if the weights do not load, are not those of the model, or are not finite.
    """
    workers = workers or WorkerGroup.alone()
    with _refused_by_all(workers):
        model_config = load_model_config(config, model_kwargs)
        match = None
        if not (config.random_init or config.gguf_file):
            match = match_checkpoint(config, auto_model, model_kwargs, new_head=new_head)
            if zero3:
                _refuse_other_labels(config, match, model_kwargs)
    auto = getattr(transformers, auto_model)
    torch.manual_seed(seed)
    if config.random_init:
        model = auto.from_config(
            model_config,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            **_attention(config),
        )
        _set_padding(model, config, auto_model)
        if zero3:
            gather_experts_whole(model)
        return model
    # transformers looks for a live object of this class while it loads.
    sharding = HfDeepSpeedConfig(zero3) if zero3 and not config.gguf_file else None
    with _refused_by_all(workers):
        with _named(config):
            model, info = auto.from_pretrained(
                _location(config),
                config=model_config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=match is not None and bool(match.mismatched),
                **_common(config),
                **_attention(config),
            )
        if match is None:
            match = CheckpointMatch.of(model, info)
            _refuse(config, match, [], new_head=new_head)
        name = first_not_finite(model)
        if name is not None:
            raise ConfigError(
                [
                    Problem(
                        "model.path",
                        f"{config.path!r} holds {name} with values that are not finite",
                    )
                ]
            )
    _clear_notes(model, sharded=sharding is not None, dequantized=bool(config.gguf_file))
    _set_padding(model, config, auto_model)
    if zero3:
        gather_experts_whole(model)
    if match.left_over:
        notify(f"not used of {config.path}: {', '.join(match.left_over)}")
    if match.new:
        notify(f"newly initialized in {config.path}: {', '.join(match.new)}")
    elif "id2label" in model_kwargs:
        follow_labels(model, load_model_config(config), model_kwargs["id2label"], notify)
    return model


def _set_padding(model: Any, config: ModelConfig, auto_model: str) -> None:
    """Name the padding token to a model that classifies by the last token before the padding."""
    text = model.config.get_text_config()
    if auto_model != "AutoModelForSequenceClassification" or text.pad_token_id is not None:
        return
    for settings in (text, model.config):
        settings.pad_token_id = load_tokenizer(config).pad_token_id


def _clear_notes(model: Any, *, sharded: bool, dequantized: bool) -> None:
    """Remove what transformers notes of a load that would spoil the save."""
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


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer; one without a padding token pads with its end-of-text token.

    Raises:
        ConfigError: if a file is damaged, or there is none with words.
    """
    location = _location(config)
    try:
        if Path(location).is_dir():
            check_texts(Path(location))
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **_common(config))
    except ConfigError:
        raise
    except Exception as error:  # the library of tokenizers raises nothing narrower
        refused = refusal("model", config.path, error)
        why = f"no tokenizer in {config.path!r}: {_first_line(error)}"
        raise ConfigError([refused or Problem("model.path", why)]) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ConfigError(
            [
                Problem(
                    "model.path",
                    f"no tokenizer in {config.path!r}: its files hold no token but special ones",
                    hint="copy the tokenizer's files there",
                )
            ]
        )
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
        revision = pinned_model(config).revision
        # Offline, the copy on this machine is what is loaded.
        values["revision"] = cached_commit("model", config.path, revision)
    return values


def pinned_model(config: ModelConfig) -> ModelConfig:
    """Return a model with the commit that its revision stands for, where it is on the hub.

    Raises:
        ConfigError: if the hub does not say, which it need not in offline mode.
    """
    if Path(_location(config)).exists():
        return config
    commit = hub_commit("model", config.path, config.revision, section="model")
    return config.model_copy(update={"revision": commit})


def fetch(config: ModelConfig) -> None:
    """Download a model of the hub to this machine, where it is not: loading it then takes no download."""
    if not Path(_location(config)).exists():
        fetch_model(config.path, pinned_model(config).revision, config.gguf_file)


def _location(config: ModelConfig) -> str:
    try:
        return resolve_path(config.path)
    except ValueError as error:
        raise ConfigError([Problem("model.path", str(error))]) from error


def _folder(config: ModelConfig) -> Path | None:
    """Return where the model's files lie on this machine; None if only transformers knows."""
    location = Path(_location(config))
    return location if location.is_dir() else None


@contextmanager
def _named(config: ModelConfig) -> Iterator[None]:
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
    folder = _folder(config)
    if folder is not None and not isinstance(error, DamagedFileError):
        try:
            check_texts(folder)
            integer_tensors(folder)
        except DamagedFileError as damage:
            return str(damage)
    return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if not isinstance(error, KeyError) else f"{lines[0]} is missing"


@contextmanager
def _refused_by_all(workers: WorkerGroup) -> Iterator[None]:
    """Raise on every worker what is wrong on any, so that none waits for one that has left."""
    problems: list[Problem] = []
    failure = None
    try:
        yield
    except ConfigError as error:
        failure, problems = error, error.problems
    found = workers.broadcast(workers.gather(problems))
    first = next((of_worker for of_worker in found if of_worker), None)
    if first is not None:
        raise ConfigError(first) from failure


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


def _attention(config: ModelConfig) -> dict[str, Any]:
    return {"attn_implementation": config.attention} if config.attention else {}


def _common(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    revision = pinned_model(config).revision
    if revision:
        values["revision"] = revision
    if config.gguf_file:
        values["gguf_file"] = config.gguf_file
    return values


def _has_weights(folder: Path) -> bool:
    return any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern))
