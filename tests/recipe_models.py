"""The tiny model that stands for a model of a recipe: of the same architecture, by its name."""

import re
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from mgpp import select_prunable
from tests import tiny

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "day",
    "night",
    "good",
]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}

# What the name of a model tells of its architecture; the first that fits.
_NAMES = {
    r"deberta-v[23]": "deberta-v2",
    r"roberta": "roberta",
    r"distilbert": "distilbert",
    r"electra": "electra",
    r"bert|minilm": "bert",
    r"bart": "bart",
    r"t5": "t5",
    r"gpt2": "gpt2",
    r"opt-": "opt",
    r"qwen2": "qwen2",
    r"qwen3": "qwen3",
    r"mistral": "mistral",
    r"llama|smollm|vicuna": "llama",
}


def family(name: str) -> str | None:
    """Return the architecture of a model of the hub, a package or another recipe, by its name."""
    return next(
        (kind for pattern, kind in _NAMES.items() if re.search(pattern, name.lower())), None
    )


def make_model(name: str, auto_model: str, folder: Path) -> None:
    """Write a tiny model of the architecture of `name`, with a tokenizer of words.

    One that a run is to make (`run:FILE`) has half of the weights of its layers at zero.

    Raises:
        ValueError: if the name does not tell the architecture.
    """
    kind = family(name)
    if kind is None:
        raise ValueError(f"{name}: its name does not tell its architecture; add it to {__name__}")
    tokenizer = _tokenizer(kind)
    config = tiny.config(
        kind,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id or tokenizer.eos_token_id,
        eos_token_id=tokenizer.sep_token_id or tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    # A pretrained model has no head for classes or answers.
    predicts_tokens = auto_model.endswith("LM")
    auto = getattr(transformers, auto_model if predicts_tokens else "AutoModel")
    model = auto.from_config(config)
    if name.startswith("run:"):
        for weight in map(model.get_parameter, select_prunable(model, [], [])):
            weight.data[weight.abs() < weight.abs().median()] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A token a word; between [CLS] and [SEP], or with an end-of-text token for models of next words."""
    causal = kind in ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")
    special = {"eos_token": "<end>"} if causal else {**SPECIAL, "mask_token": "[MASK]"}
    made = tiny.word_tokenizer(
        [*special.values(), *WORDS],
        unknown=special.get("unk_token", "day"),
        ends=None if causal else ("[CLS]", "[SEP]"),
        **special,
    )
    if kind == "bart":
        made.model_input_names = ["input_ids", "attention_mask"]
    return made
