"""Tiny random decoders of several families, a tokenizer, and text for them."""

import random
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

WORDS = ["[UNK]", "<end>", *(f"w{i}" for i in range(30))]
NUM_LAYERS = 3
_SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA, sliding_window=4),
    "qwen2": Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gpt2": GPT2Config(**_SIZES),
    "opt": OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=8),
    # Their layers return tuples.
    "falcon": FalconConfig(**_SIZES, alibi=False),
    "bloom": BloomConfig(**_SIZES),
    "gptj": GPTJConfig(**_SIZES, rotary_dim=2),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", eos_token="<end>")


def make_decoder(kind: str):
    """Return a random decoder whose weights are larger than usual, so that its layers do something."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def write_decoder(kind: str, folder: Path) -> None:
    make_decoder(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def text(num_words: int, seed: int) -> str:
    """Return words that tend to follow one another, so that inputs are correlated."""
    draw = random.Random(seed)
    number, words = 0, []
    for _ in range(num_words):
        number = (number + draw.choice([1, 1, 1, 2, 7])) % 30
        words.append(f"w{number}")
    return " ".join(words)


def write_blocks(folder: Path, num_blocks: int = 12, length: int = 10) -> None:
    """Write the data stage's folder."""
    tokenizer = make_tokenizer()
    ids = [tokenizer(text(length, seed))["input_ids"] for seed in range(num_blocks)]
    rows = Dataset.from_dict({"input_ids": ids})
    DatasetDict(train=rows, validation=rows).save_to_disk(str(folder / "dataset"))
    tokenizer.save_pretrained(folder / "tokenizer")
