"""Every tiny random model and tokenizer of the tests, by architecture, with sizes a test may change."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    AutoConfig,
    BertModel,
    BertTokenizerFast,
    GPT2TokenizerFast,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
)

# A size, and the fields by which architectures know it.
_FIELDS = {
    "hidden_size": (
        "hidden_size",
        "d_model",
        "n_embd",
        "dim",
        "embedding_size",
        "word_embed_proj_dim",
    ),
    "num_hidden_layers": (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
    ),
    "num_attention_heads": (
        "num_attention_heads",
        "num_key_value_heads",
        "num_heads",
        "n_head",
        "n_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    "head_size": ("head_dim", "d_kv"),
    "intermediate_size": (
        "intermediate_size",
        "hidden_dim",
        "d_ff",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
}
# Settings of DeBERTa-v3's own configuration that are not the class's defaults.
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
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD = ["good", "great", "lovely", "fine", "superb", "happy", "bright", "kind"]
BAD = ["bad", "awful", "ugly", "poor", "dreadful", "sad", "dull", "cruel"]
DAY_WORDS = [*BERT_SPECIAL, *GOOD, *BAD, "a", "day", "##s", "not"]


# Models.


def config(
    kind: str,
    *,
    hidden_size: int = 16,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    intermediate_size: int = 64,
    max_position_embeddings: int = 64,
    **changes: Any,
) -> PretrainedConfig:
    """Return the configuration of a tiny model.

    Args:
        kind: the architecture, by its `model_type` ("bert", "gpt2", ...).
        hidden_size: the width of every stack; the other sizes alike, whatever the architecture
            calls them.
        changes: any field, by the architecture's own name.
    """
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "head_size": hidden_size // num_attention_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
    }
    known = AutoConfig.for_model(kind).to_dict()
    fields = {name: size for key, size in sizes.items() for name in _FIELDS[key] if name in known}
    more = _DEBERTA_V3 if kind == "deberta-v2" else {}
    return AutoConfig.for_model(kind, **{"vocab_size": 32, **fields, **more, **changes})


def model(head: type[PreTrainedModel], *, seed: int | None = 0, **changes: Any) -> Any:
    """Return a random model of a class of transformers, such as `BertForMaskedLM`.

    Args:
        seed: of its weights; None draws them from torch's generator as it is.
        changes: as of `config`.
    """
    if seed is not None:
        torch.manual_seed(seed)
    return head(config(head.config_class.model_type, **changes))


def write_bert(
    folder: Path, vocabulary: Sequence[str], head: type[PreTrainedModel] = BertModel, **changes: Any
) -> None:
    """Write a random BERT and its tokenizer of a vocabulary that begins with BERT_SPECIAL."""
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    assert len(tokenizer) == len(vocabulary)
    tokenizer.save_pretrained(folder)
    model(head, vocab_size=len(vocabulary), **changes).save_pretrained(folder)


# Decoders of many families, which share a tokenizer of words.

DECODER_WORDS = ["[UNK]", "<end>", *(f"w{i}" for i in range(30))]
DECODER_LAYERS = 3
_LLAMA = {"num_key_value_heads": 2, "intermediate_size": 24}
DECODERS: Mapping[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 4},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gpt2": {},
    "opt": {"intermediate_size": 24, "word_embed_proj_dim": 8},
    # Their layers return tuples.
    "falcon": {"alibi": False},
    "bloom": {},
    "gptj": {"rotary_dim": 2},
    "mixtral": {**_LLAMA, "head_dim": 4, "num_local_experts": 4},
    "gpt_oss": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def decoder(kind: str) -> Any:
    """Return one of DECODERS with weights larger than usual, so that its layers do something."""
    settings = config(
        kind,
        vocab_size=len(DECODER_WORDS),
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
        **DECODERS[kind],
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return made


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of DECODER_WORDS."""
    return word_tokenizer(DECODER_WORDS, unknown="[UNK]", unk_token="[UNK]", eos_token="<end>")


def write_decoder(kind: str, folder: Path) -> None:
    """Write one of DECODERS and its tokenizer."""
    decoder(kind).save_pretrained(folder)
    decoder_tokenizer().save_pretrained(folder)


# Tokenizers.


def word_tokenizer(
    words: Sequence[str], *, unknown: str, ends: tuple[str, str] | None = None, **special: Any
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token a word.

    Args:
        words: the vocabulary, special tokens among it.
        unknown: the word that stands for all others.
        ends: words put before and after a text; of a pair, the last also between the two.
        special: special tokens and settings of the tokenizer, by transformers' names.
    """
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    if ends:
        first, last = ends
        tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(end, words.index(end)) for end in ends],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


NUMBER_WORDS = ["[UNK]", "<end>", "None", "one", "two", "three", "four", "five", "six", "seven"]
SEQUENCE_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "red", "green", "blue", "one", "two"]


def number_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of NUMBER_WORDS, with no special token but the unknown one by default."""
    return word_tokenizer(NUMBER_WORDS, unknown="[UNK]", unk_token="[UNK]", **special)


def sequence_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of SEQUENCE_WORDS, whose texts stand between a start and an end token."""
    return word_tokenizer(
        SEQUENCE_WORDS,
        unknown="<unk>",
        ends=("<s>", "</s>"),
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def wordpiece_tokenizer(texts: Iterable[str], vocab_size: int) -> BertTokenizerFast:
    """Return BERT's tokenizer, trained on texts."""
    trained = Tokenizer(WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=BERT_SPECIAL, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    return BertTokenizerFast(vocab=trained.get_vocab())


def roberta_tokenizer(texts: Iterable[str], vocab_size: int) -> RobertaTokenizerFast:
    """Return RoBERTa's tokenizer, trained on texts."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return RobertaTokenizerFast(**_byte_pairs(texts, vocab_size, special))


def gpt2_tokenizer(texts: Iterable[str], vocab_size: int) -> GPT2TokenizerFast:
    """Return GPT-2's tokenizer, trained on texts, padded by its end of text."""
    tokenizer = GPT2TokenizerFast(**_byte_pairs(texts, vocab_size, ["<|endoftext|>"]))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _byte_pairs(texts: Iterable[str], vocab_size: int, special: list[str]) -> dict[str, Any]:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    merges = json.loads(trained.to_str())["model"]["merges"]
    return {"vocab": trained.get_vocab(), "merges": [tuple(merge) for merge in merges]}
