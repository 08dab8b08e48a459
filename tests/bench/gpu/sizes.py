"""What is run, at which sizes and for how long: one table for a GPU of 80 GB, one for a dry run on a CPU.

A part is a module with `measure(size, device, folder)`, run in a process of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part at one size.

    Attributes:
        name: its own.
        module: of `tests.bench.gpu`.
        seconds: after so many it is ended, and counts as failed.
        size: what its module is given.
    """

    name: str
    module: str
    seconds: float
    size: Mapping[str, Any]


_BF16 = ("stage0-bf16", "stage1-bf16", "stage2-bf16", "stage3-bf16")
_LAYOUTS = (
    *_BF16,
    "stage1-bf16+fp32",
    "stage3-subgroups-bf16",
    "stage2-offload-bf16",
    "stage3-offload-bf16",
    *(f"stage{stage}-fp32" for stage in (0, 1, 2, 3)),
    *(f"stage{stage}-fp16" for stage in (1, 2, 3)),
)
_GPT2 = {
    "settings": {
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "vocab_size": 50304,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "rows": 16,
    "length": 1024,
    "steps": 60,
    "precision": "bf16",
}
_TINY_GPT2 = {
    "settings": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "rows": 4,
    "length": 16,
    "steps": 4,
    "precision": "bf16",
}


def _throughput(size: Mapping[str, Any], rounds: int, seconds: float) -> list[Part]:
    """Both in turn, each time in a new process."""
    return [
        Part(
            name=f"throughput-{mode}-{turn}",
            module="throughput",
            seconds=seconds,
            size={**size, "mode": mode, "turn": turn},
        )
        for turn in range(rounds)
        for mode in ("ours", "trainer")
    ]


GPU = [
    Part(name="layouts", module="layouts", seconds=240, size={"cases": _LAYOUTS}),
    Part(
        name="kernels",
        module="kernels",
        seconds=150,
        size={"numels": (35, 131, 8191, 70_001, 3_000_017, 0), "matrices": (12, 256, 300)},
    ),
    Part(
        name="pruning",
        module="pruning",
        seconds=150,
        size={
            "weights": {"85m": (36, 768, 3072), "1b": (62, 2048, 8192)},
            "rounds": 15,
        },
    ),
    Part(
        name="steps",
        module="steps",
        seconds=240,
        size={
            "bert": {
                "kind": "BertForSequenceClassification",
                "settings": {},
                "rows": 32,
                "length": 128,
                "rounds": 12,
            },
            "llama-1b": {
                "kind": "LlamaForCausalLM",
                "settings": {
                    "hidden_size": 2048,
                    "intermediate_size": 8192,
                    "num_hidden_layers": 16,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "vocab_size": 32768,
                    "tie_word_embeddings": True,
                },
                "rows": 8,
                "length": 1024,
                "rounds": 8,
            },
        },
    ),
    *_throughput(_GPT2, rounds=2, seconds=75),
    Part(
        name="batches",
        module="batches",
        seconds=45,
        size={"rows": 4096, "length": 1024, "batch": 32, "vocabulary": 50304},
    ),
    Part(
        name="evaluation",
        module="evaluation",
        seconds=60,
        size={**_GPT2, "batches": 8},
    ),
]
DRY_RUN = [
    Part(name="layouts", module="layouts", seconds=60, size={"cases": _BF16}),
    Part(
        name="kernels",
        module="kernels",
        seconds=60,
        size={"numels": (35, 131, 8191, 0), "matrices": (4, 16, 20)},
    ),
    Part(
        name="pruning",
        module="pruning",
        seconds=60,
        size={"weights": {"85m": (6, 24, 32), "1b": (4, 32, 48)}, "rounds": 2},
    ),
    Part(
        name="steps",
        module="steps",
        seconds=60,
        size={
            "bert": {
                "kind": "BertForSequenceClassification",
                "settings": {
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                    "vocab_size": 64,
                },
                "rows": 2,
                "length": 8,
                "rounds": 1,
            },
            "llama-1b": {
                "kind": "LlamaForCausalLM",
                "settings": {
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "vocab_size": 64,
                },
                "rows": 2,
                "length": 8,
                "rounds": 1,
            },
        },
    ),
    *_throughput(_TINY_GPT2, rounds=1, seconds=60),
    Part(
        name="batches",
        module="batches",
        seconds=60,
        size={"rows": 64, "length": 16, "batch": 4, "vocabulary": 64},
    ),
    Part(
        name="evaluation",
        module="evaluation",
        seconds=60,
        size={**_TINY_GPT2, "batches": 3},
    ),
]
