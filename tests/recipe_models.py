"""Tiny models with random weights, each of its big sister's architecture, and tokenizers of words."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast

from mgpp import select_prunable

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
POSITIONS = 64

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
# Settings by the names families give them; what a family does not have is left out.
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "d_model": 16,
    "n_embd": 16,
    "dim": 16,
    "embedding_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 64,  # four times the width, as in the big ones: budgets go by shares of weights
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "hidden_dim": 64,
    "d_ff": 64,
    "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS,
}
# What DeBERTa-v3's own configuration sets besides.
_DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "max_relative_positions": -1,
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
    settings = AutoConfig.for_model(kind)
    changes = {key: value for key, value in _SIZES.items() if hasattr(settings, key)}
    changes |= _DEBERTA_V3 if kind == "deberta-v2" else {}
    config = AutoConfig.for_model(
        kind,
        **changes,
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
    words = [*special.values(), *WORDS]
    unknown = special.get("unk_token", "day")
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    if not causal:
        ends = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if kind == "bart":
        made.model_input_names = ["input_ids", "attention_mask"]
    return made
