"""Models and tokenizers as they are loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig

from pipeline.errors import ConfigError, Problem
from pipeline.models.checkpoint_check import (
    CheckpointMatch,
    first_not_finite,
    match_checkpoint,
    refuse,
    refuse_other_labels,
)
from pipeline.models.labels import follow_labels
from pipeline.models.passed_over import gather_experts_whole
from pipeline.models.settings import load_model_config
from pipeline.models.source import (
    ModelConfig,
    attention_option,
    first_line,
    load_options,
    location_of,
    named,
)
from pipeline.models.weight_files import check_texts
from pipeline.storage.hub import refusal
from pipeline.worker_group import WorkerGroup


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
                refuse_other_labels(config, match, model_kwargs)
    auto = getattr(transformers, auto_model)
    torch.manual_seed(seed)
    if config.random_init:
        model = auto.from_config(
            model_config,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            **attention_option(config),
        )
        _set_padding(model, config, auto_model)
        if zero3:
            gather_experts_whole(model)
        return model
    # transformers looks for a live object of this class while it loads.
    sharding = HfDeepSpeedConfig(zero3) if zero3 and not config.gguf_file else None
    with _refused_by_all(workers):
        with named(config):
            model, info = auto.from_pretrained(
                location_of(config),
                config=model_config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=match is not None and bool(match.mismatched),
                **load_options(config),
                **attention_option(config),
            )
        if match is None:
            match = CheckpointMatch.of(model, info)
            refuse(config, match, [], new_head=new_head)
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
    location = location_of(config)
    try:
        if Path(location).is_dir():
            check_texts(Path(location))
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **load_options(config))
    except ConfigError:
        raise
    except Exception as error:  # the library of tokenizers raises nothing narrower
        refused = refusal("model", config.path, error)
        why = f"no tokenizer in {config.path!r}: {first_line(error)}"
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
