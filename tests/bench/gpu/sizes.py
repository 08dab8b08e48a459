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
        module: in full.
        seconds: after so many it is ended, and counts as failed.
        size: what its module is given.
    """

    name: str
    module: str
    seconds: float
    size: Mapping[str, Any]

    @property
    def group(self) -> str:
        """The name by which it can be asked for."""
        return self.module.split(".")[-1]


def _part(name: str, module: str, seconds: float, **size: Any) -> Part:
    return Part(name=name, module=f"tests.bench.gpu.{module}", seconds=seconds, size=size)


_STAGES = (0, 1, 2, 3)
_BF16 = tuple(f"stage{stage}-bf16+fp32" for stage in _STAGES)  # gradients as they are by default
_LAYOUTS = (
    *_BF16,
    *(f"stage{stage}-bf16" for stage in _STAGES),
    *(f"stage{stage}-offload-bf16+fp32" for stage in (1, 2, 3)),
    "stage3-subgroups-bf16+fp32",
    *(f"stage{stage}-fp32" for stage in _STAGES),
    *(f"stage{stage}-fp16+fp32" for stage in (1, 2, 3)),
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
        _part(f"throughput-{mode}-{turn}", "throughput", seconds, **size, mode=mode, turn=turn)
        for turn in range(rounds)
        for mode in ("ours", "trainer")
    ]


_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "tie_word_embeddings": True,
}
_TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}
_BERT, _LLAMA = (
    {"model": "bert", "kind": "BertForSequenceClassification"},
    {"model": "llama-1b", "kind": "LlamaForCausalLM"},
)
_FEW = {"rows": 2, "length": 8, "rounds": 1}
GPU = [
    _part("layouts", "layouts", 240, cases=_LAYOUTS),
    _part(
        "kernels",
        "kernels",
        150,
        numels=(35, 131, 8191, 70_001, 3_000_017, 0),
        matrices=(12, 256, 300),
    ),
    _part(
        "pruning",
        "pruning",
        140,
        weights={"85m": (36, 768, 3072), "1b": (62, 2048, 8192)},
        rounds=15,
    ),
    _part("steps-bert", "steps", 100, **_BERT, settings={}, rows=32, length=128, rounds=12),
    _part(
        "steps-llama-1b", "steps", 150, **_LLAMA, settings=_LLAMA_1B, rows=8, length=1024, rounds=8
    ),
    *_throughput(_GPT2, rounds=2, seconds=75),
    _part("batches", "batches", 45, rows=4096, length=1024, batch=32, vocabulary=50304),
    _part("evaluation", "evaluation", 60, **_GPT2, batches=8),
]
DRY_RUN = [
    _part("layouts", "layouts", 60, cases=_BF16),
    _part("kernels", "kernels", 60, numels=(35, 131, 8191, 0), matrices=(4, 16, 20)),
    _part("pruning", "pruning", 60, weights={"85m": (6, 24, 32), "1b": (4, 32, 48)}, rounds=2),
    _part("steps-bert", "steps", 60, **_BERT, settings=_TINY, **_FEW),
    _part("steps-llama-1b", "steps", 60, **_LLAMA, settings=_TINY, **_FEW),
    *_throughput(_TINY_GPT2, rounds=1, seconds=60),
    _part("batches", "batches", 60, rows=64, length=16, batch=4, vocabulary=64),
    _part("evaluation", "evaluation", 60, **_TINY_GPT2, batches=3),
]
