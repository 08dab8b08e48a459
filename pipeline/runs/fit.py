"""Whether a model fits its tokenizer, the task (tokens, lengths, padding, direction) and the pruning."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from mgpp import towers_of
from pipeline.errors import Problem
from pipeline.models.source import ModelConfig, folder_of
from pipeline.models.trial import Behaviour, pattern_of
from pipeline.models.weight_files import count_zeros
from pipeline.tasks import TASKS

_POSITIONS = re.compile(r"^(wpe|(?!rel).*pos(ition)?s?_?embed.*|.*embed_pos.*)$")
_FIXED_POSITIONS = ("embed_positions", "pos_encoding")  # of GPT-J and CodeGen; of CTRL
_CAUSAL, _TO_TEXT = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
_UNPADDED = ("causal-lm", "masked-lm")  # their rows are blocks of one length
_OF_SEQUENCES = ("classification", "regression")


def fit_problems(
    model: Any, tokenizer: Any, task: Any, behaviour: Behaviour | None
) -> list[Problem]:
    """Return in what a model, its tokenizer and a task do not fit.

    Args:
        model: on the meta device.
        tokenizer: the model's.
        task: the task's settings.
        behaviour: of the model, if it is known.
    """
    return [
        *_of_vocabulary(model, tokenizer),
        *_of_lengths(model, tokenizer, task),
        *_of_padding(model, tokenizer, task),
        *_of_direction(model, task, behaviour),
        *_of_start(model, task, behaviour),
        *_of_kind(model, task),
    ]


def num_positions(model: Any, *, decoder: bool = False) -> int | None:
    """Return how many tokens a model has positions for, None where any number will do.

    Args:
        model: on the meta device.
        decoder: of the decoder beside an encoder, not of the encoder.
    """
    limits = [
        rows
        for name, rows in _position_tables(model)
        if not model.config.is_encoder_decoder or decoder == ("decoder" in name.split("."))
    ]
    settings = model.config.get_text_config()
    rope = getattr(settings, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type", "default") == "default":
        limits.append(settings.max_position_embeddings)
    return min(limits, default=None)


def _position_tables(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the names of tables of positions of tokens, and how many tokens each is for."""
    others = towers_of(model)
    for name, module in model.named_modules():
        if f"{name}.".startswith(others):
            continue
        if isinstance(module, nn.Embedding) and _POSITIONS.match(name.rpartition(".")[2]):
            # RoBERTa's positions begin after that of padding, BART's and OPT's at an offset.
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            yield name, module.num_embeddings - (getattr(module, "offset", 0) or padding)
        for own, table in module.named_buffers(recurse=False):
            if own in _FIXED_POSITIONS and table.dim() == 2:
                yield f"{name}.{own}", table.shape[0]


def _of_vocabulary(model: Any, tokenizer: Any) -> list[Problem]:
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (
        NotImplementedError,
        AttributeError,
    ):  # CANINE hashes characters, Perceiver embeds bytes
        return []
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest < rows:
        return []
    return [
        Problem(
            "model.path",
            f"its tokenizer has token {largest} ({token!r}), but the model embeds only {rows} tokens",
            hint="use the tokenizer that the model was trained with",
        )
    ]


def _of_lengths(model: Any, tokenizer: Any, task: Any) -> list[Problem]:
    found = []
    asked = {"max_length": (task.max_length, num_positions(model))}
    if hasattr(task, "max_target_length"):
        asked["max_target_length"] = (task.max_target_length, num_positions(model, decoder=True))
    for name, (length, limit) in asked.items():
        if limit is not None and length > limit:
            found.append(
                Problem(f"task.{name}", f"the model has positions for {limit} tokens", got=length)
            )
    texts = 2 if task.type in _OF_SEQUENCES and len(task.text) > 1 else 1
    special = 0
    if task.type not in (*_UNPADDED, "instruction", "question-answering"):
        special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    least = max(special + texts, 2)
    if task.max_length < least:
        found.append(
            Problem(
                "task.max_length",
                f"{special} special tokens and one of each text take {least}"
                if special
                else f"must be at least {least}",
                got=task.max_length,
            )
        )
    return found


def _of_padding(model: Any, tokenizer: Any, task: Any) -> list[Problem]:
    if task.type in _UNPADDED:
        return []
    if tokenizer.pad_token_id is None:
        return [
            Problem(
                "model.path",
                "its tokenizer has neither a padding nor an end-of-text token to pad rows with",
                hint="name one in its tokenizer_config.json (pad_token)",
            )
        ]
    settings = model.config.get_text_config()
    pads = getattr(settings, "pad_token_id", None)
    if task.type in _OF_SEQUENCES and pads not in (None, tokenizer.pad_token_id):
        return [_other_token("pad", "pads with", pads, tokenizer.pad_token_id)]
    if TASKS[task.type].auto_model != _TO_TEXT:
        return []
    # The model shifts labels itself, whose gaps it fills with its padding, and generates up to its end.
    settings = model.config
    tokens = [("pad", "pads with"), ("eos", "ends texts with")]
    found = []
    for kind, does in tokens:
        ours = getattr(settings, f"{kind}_token_id", None)
        theirs = getattr(tokenizer, f"{kind}_token_id")
        if theirs is not None and theirs not in (ours if isinstance(ours, list) else [ours]):
            found.append(_other_token(kind, does, ours, theirs))
    return found


def _other_token(kind: str, does: str, ours: Any, theirs: int) -> Problem:
    takes = {"pad": "padding", "eos": "the end"}[kind]
    return Problem(
        "model.path",
        f"its tokenizer {does} token {theirs}, the model takes {ours} for {takes}",
        hint=f"set model.overrides.{kind}_token_id: {theirs}",
    )


def unreached_problems(
    names: Sequence[str], exclude: Sequence[str], behaviour: Behaviour | None
) -> list[Problem]:
    """Return which of the prunable weights have no part in what a model makes of texts.

    Args:
        names: of the prunable weights.
        exclude: the patterns of names that are left out already.
        behaviour: of the model, if it is known.
    """
    patterns = {name: pattern_of(name) for name in names}
    unreached = [name for name in names if behaviour and patterns[name] in behaviour.unreached]
    if not unreached:
        return []
    excluded = [*exclude, *dict.fromkeys(patterns[name] for name in unreached)]
    return [
        Problem(
            "prune.exclude",
            f"texts do not reach {len(unreached)} of the {len(names)} prunable weights, the first "
            f"{unreached[0]}: without a gradient they would be pruned in the stead of others",
            hint=f"set prune.exclude: {excluded}",
        )
    ]


def _of_direction(model: Any, task: Any, behaviour: Behaviour | None) -> list[Problem]:
    if TASKS[task.type].auto_model != _CAUSAL:
        return []
    looks_ahead = behaviour.looks_ahead if behaviour else None
    if looks_ahead is None:
        looks_ahead = _is_marked_bidirectional(model)
    if not looks_ahead:
        return []
    return [
        Problem(
            "task.type",
            f"{type(model).__name__} sees the tokens after the one it predicts, so that its perplexity "
            "means nothing",
            got=task.type,
            hint="use masked-lm, or model.overrides.is_decoder: true"
            if hasattr(model.config, "is_decoder")
            else "use masked-lm, or another model",
        )
    ]


def _is_marked_bidirectional(model: nn.Module) -> bool:
    flags = [
        module.is_causal
        for module in model.modules()
        if isinstance(getattr(module, "is_causal", None), bool)
    ]
    return bool(flags) and not any(flags)


def _of_start(model: Any, task: Any, behaviour: Behaviour | None) -> list[Problem]:
    """T5's configuration alone does not say it; its checkpoints do.

    What classifies needs it where the decoder's inputs are made of the encoder's: not in mBART.
    """
    if (
        not model.config.is_encoder_decoder
        or getattr(model.config, "decoder_start_token_id", None) is not None
        or (TASKS[task.type].auto_model != _TO_TEXT and behaviour is not None)
    ):
        return []
    return [
        Problem(
            "model.path",
            "its configuration does not say with which token the decoder begins",
            hint="name it: model.overrides.decoder_start_token_id",
        )
    ]


def _of_kind(model: Any, task: Any) -> list[Problem]:
    if TASKS[task.type].auto_model != _TO_TEXT or model.config.is_encoder_decoder:
        return []
    return [
        Problem(
            "task.type",
            f"{type(model).__name__} has no decoder beside an encoder",
            got=task.type,
            hint="use instruction, or another model",
        )
    ]


def zeros_problems(model: ModelConfig, prune: Any, empty: nn.Module) -> list[Problem]:
    """Check that a model whose zeros are kept has any, and not too many, where its files tell.

    Args:
        model: that pruning starts from.
        prune: the section.
        empty: the model, on the meta device.
    """
    if not prune.settings.keep_zeros:
        return []
    names, folder = prune.settings.select(empty), folder_of(model)
    zeros: int | None = None  # where that is not known
    if model.random_init:
        zeros = 0
    elif folder is not None and not model.gguf_file:
        zeros = count_zeros(folder, names)
    if zeros == 0:
        return [
            Problem(
                "prune.keep_zeros",
                f"no prunable weight of {model.path!r} is zero: there are no zeros to keep",
                got=True,
                hint="start from a model that was pruned before, or leave keep_zeros out",
            )
        ]
    numel = sum(empty.get_parameter(name).numel() for name in names)
    if zeros is None or zeros <= math.ceil(prune.sparsity * numel):
        return []
    return [
        Problem(
            "prune.sparsity",
            f"{zeros:,} of the {numel:,} prunable weights of {model.path!r} are zero already "
            f"({zeros / numel:.2%}), and prune.keep_zeros keeps them",
            got=prune.sparsity,
            hint="ask for more, or leave keep_zeros out",
        )
    ]
