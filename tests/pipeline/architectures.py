"""Run on ranks: prunes a tiny model of each architecture under ZeRO 2 and 3, and exports it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import deepspeed
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset, DatasetDict

from pipeline.context import Context
from pipeline.errors import ConfigError
from pipeline.export.checkpoint import ExportConfig, export_model, read_weights
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.models.weights import WEIGHTS_FILE
from pipeline.pruning.config import PruneSection
from pipeline.storage.outputs import OutputFiles
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tasks.masked_lm import MaskedLMConfig
from pipeline.tasks.text_to_text import TextToTextConfig
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig, deepspeed_config
from pipeline.training.loop import train
from pipeline.worker_group import WorkerGroup
from tests import tiny
from tests.cases import run_cases

MASKED = MaskedLMConfig(type="masked-lm", max_length=12)
CAUSAL = CausalLMConfig(type="causal-lm", max_length=12)
TEXT = TextToTextConfig(type="text-to-text", source="a", target="b")
WORDS = ["<pad>", "<end>", "[UNK]", "[MASK]", *(f"w{i}" for i in range(28))]
SPARSITY, STEPS, LR = 0.8, 5, 1e-4
STAGES = (2, 3)
SHARDED = "sharded.pt"  # the weights of an export as they load under ZeRO 3
DAMAGED = "damaged-on-one-worker"

_KV = {"num_key_value_heads": 1}
_START = {"decoder_start_token_id": 0}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of models.

    Attributes:
        kind: `model_type` of its configuration.
        task: what its model is trained on.
        count: elements of all matrices of its layers, from its configuration alone.
        settings: of its configuration besides the sizes that all share.
    """

    kind: str
    task: Any
    count: Callable[[Any], int]
    settings: dict[str, Any] = field(default_factory=dict)


def _bert(c: Any) -> int:
    return c.num_hidden_layers * _two(c.hidden_size, c.intermediate_size)


def _two(width: int, inner: int, attentions: int = 1) -> int:
    """Four projections an attention, and two of the feed-forward."""
    return attentions * 4 * width**2 + 2 * width * inner


def _grouped_attention(c: Any) -> int:
    of_queries = c.num_attention_heads * c.head_dim
    return c.hidden_size * (2 * of_queries + 2 * c.num_key_value_heads * c.head_dim)


def _llama(c: Any) -> int:
    gated = 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * (_grouped_attention(c) + gated)


def _phi3(c: Any) -> int:
    size = c.hidden_size // c.num_attention_heads
    attention = 2 * c.hidden_size * size * (c.num_attention_heads + c.num_key_value_heads)
    return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def _mixture(c: Any, num_experts: int, inner: int) -> int:
    return c.num_hidden_layers * (_grouped_attention(c) + num_experts * 3 * c.hidden_size * inner)


def _deepseek(c: Any) -> int:
    heads, rope = c.num_attention_heads, c.qk_rope_head_dim
    queries = c.q_lora_rank * (c.hidden_size + heads * (c.qk_nope_head_dim + rope))
    keys = c.hidden_size * (c.kv_lora_rank + rope)
    values = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention = queries + keys + values + heads * c.v_head_dim * c.hidden_size
    dense = c.first_k_dense_replace
    experts = (c.n_routed_experts + c.n_shared_experts) * c.moe_intermediate_size
    inner = dense * c.intermediate_size + (c.num_hidden_layers - dense) * experts
    return c.num_hidden_layers * attention + 3 * c.hidden_size * inner


def _mamba2(c: Any) -> int:
    inner = c.expand * c.hidden_size
    projected = 2 * inner + 2 * c.n_groups * c.state_size + c.num_heads
    return c.num_hidden_layers * c.hidden_size * (projected + inner)


def _t5(c: Any) -> int:
    width = c.num_heads * c.d_kv
    assert width == c.d_model
    decoder = c.num_decoder_layers * _two(width, c.d_ff, attentions=2)
    return c.num_layers * _two(width, c.d_ff) + decoder


def _bart(c: Any) -> int:
    decoder = c.decoder_layers * _two(c.d_model, c.decoder_ffn_dim, attentions=2)
    return c.encoder_layers * _two(c.d_model, c.encoder_ffn_dim) + decoder


ARCHITECTURES = {
    "bert": Architecture(kind="bert", task=MASKED, count=_bert),
    "roberta": Architecture(kind="roberta", task=MASKED, count=_bert),
    "deberta-v3": Architecture(kind="deberta-v2", task=MASKED, count=_bert),
    "modernbert": Architecture(
        kind="modernbert",
        task=MASKED,
        count=lambda c: (
            c.num_hidden_layers * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size)
        ),
        settings={"cls_token_id": 1, "sep_token_id": 1},
    ),
    "albert": Architecture(  # all layers share their weights
        kind="albert",
        task=MASKED,
        count=lambda c: c.num_hidden_groups * _two(c.hidden_size, c.intermediate_size),
        settings={"embedding_size": 8},
    ),
    "gpt2": Architecture(
        kind="gpt2", task=CAUSAL, count=lambda c: c.n_layer * _two(c.n_embd, 4 * c.n_embd)
    ),
    "opt": Architecture(
        kind="opt",
        task=CAUSAL,
        count=lambda c: c.num_hidden_layers * _two(c.hidden_size, c.ffn_dim),
        settings={"word_embed_proj_dim": 8},
    ),
    "llama": Architecture(kind="llama", task=CAUSAL, count=_llama, settings=_KV),
    "llama-tied": Architecture(
        kind="llama", task=CAUSAL, count=_llama, settings={**_KV, "tie_word_embeddings": True}
    ),
    "qwen3": Architecture(kind="qwen3", task=CAUSAL, count=_llama, settings=_KV),
    "gemma3": Architecture(kind="gemma3_text", task=CAUSAL, count=_llama, settings=_KV),
    "phi3": Architecture(kind="phi3", task=CAUSAL, count=_phi3, settings=_KV),
    "mixtral": Architecture(
        kind="mixtral",
        task=CAUSAL,
        count=lambda c: _mixture(c, c.num_local_experts, c.intermediate_size),
        settings={**_KV, "head_dim": 8, "num_local_experts": 4},
    ),
    "qwen3-moe": Architecture(
        kind="qwen3_moe",
        task=CAUSAL,
        count=lambda c: _mixture(c, c.num_experts, c.moe_intermediate_size),
        settings={
            **_KV,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        },
    ),
    "gpt-oss": Architecture(
        kind="gpt_oss",
        task=CAUSAL,
        count=lambda c: _mixture(c, c.num_local_experts, c.intermediate_size),
        settings={**_KV, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek-v3": Architecture(
        kind="deepseek_v3",
        task=CAUSAL,
        count=_deepseek,
        settings={
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "head_dim": 4,  # what is rotated
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
        },
    ),
    "mamba2": Architecture(
        kind="mamba2",
        task=CAUSAL,
        count=_mamba2,
        settings={"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    ),
    "t5": Architecture(kind="t5", task=TEXT, count=_t5, settings=_START),
    "t5-untied": Architecture(
        kind="t5", task=TEXT, count=_t5, settings={**_START, "tie_word_embeddings": False}
    ),
    "bart": Architecture(kind="bart", task=TEXT, count=_bart),
}
CASES = tuple(f"{name}-stage{stage}" for name in ARCHITECTURES for stage in STAGES)


def write_inputs(folder: Path) -> None:
    """Write the tokenizer and the rows that all models share."""
    tokenizer = tiny.word_tokenizer(
        WORDS,
        unknown="[UNK]",
        unk_token="[UNK]",
        pad_token="<pad>",
        eos_token="<end>",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, len(WORDS), (16, 12), generator=generator).tolist()
    both = {"input_ids": rows, "attention_mask": [[1] * 12] * 16}
    for name, columns in {"blocks": {"input_ids": rows}, "pairs": {**both, "labels": rows}}.items():
        splits = DatasetDict(
            train=Dataset.from_dict(columns), validation=Dataset.from_dict(columns)
        )
        splits.save_to_disk(str(folder / name / "dataset"))
        tokenizer.save_pretrained(folder / name / "tokenizer")


def config_of(architecture: Architecture) -> Any:
    """Return the configuration of the tiny model."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "vocab_size": len(WORDS)}
    settings = {"intermediate_size": 24, **special, **architecture.settings}
    return tiny.config(architecture.kind, **settings)


def write_model(name: str, folder: Path) -> None:
    """Write a random model whose matrices hold no zero."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    auto = getattr(transformers, make_task(architecture.task).auto_model)
    model = auto.from_config(config_of(architecture))
    model.save_pretrained(folder)


def prune(case: str, folder: Path) -> None:
    """Prune one model and export it to `<case>/export/model`."""
    name, _, stage = case.rpartition("-stage")
    architecture, workers = ARCHITECTURES[name], WorkerGroup.current()
    dense, output = folder / name, folder / case
    if workers.is_main and not dense.exists():
        write_model(name, dense)
        shutil.copytree(folder / "tokenizer", dense, dirs_exist_ok=True)
    dist.barrier()
    task = make_task(architecture.task)
    context = Context(
        inputs={"data": folder / ("pairs" if architecture.task is TEXT else "blocks")},
        model_kwargs={},
        output=output,
        workers=workers,
        checkpoints=CheckpointStore(str(output / "checkpoints"), workers),
        progress=lambda record: None,
    )
    output.mkdir(exist_ok=True)
    train(
        context,
        model_config=ModelConfig(path=str(dense)),
        task=task,
        config=TrainConfig(length=STEPS, batch_size=4, lr=LR),
        zero=ZeroConfig(stage=int(stage), precision="fp32", bucket_elements=10_000),
        prune=PruneSection(
            sparsity=SPARSITY, initial_sparsity=0.2, start_after=1, finetune=1, interval=2
        ),
    )
    if workers.is_main:
        export_model(
            trained=output / "model",
            weights=read_weights(output, WEIGHTS_FILE),
            auto_model=task.auto_model,
            pruning={},
            card=_CARD,
            config=ExportConfig(),
            trust_remote_code=False,
            output=output / "export",
            files=OutputFiles(str(output / "export")),
        )
    dist.barrier()
    if stage == "3":
        model = load_sharded(name, output / "export" / "model")
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if workers.is_main:
            torch.save(state, output / SHARDED)


def load_sharded(name: str, folder: Path) -> Any:
    """Load a model as it is under ZeRO 3."""
    settings = deepspeed_config(
        ZeroConfig(stage=3, precision="fp32", bucket_elements=10_000),
        micro_batch_size=1,
        accumulation=1,
        gradient_clipping=None,
        on_gpu=False,
    )
    return load_model(
        ModelConfig(path=str(folder)),
        make_task(ARCHITECTURES[name].task).auto_model,
        model_kwargs={},
        dtype=torch.float32,
        seed=1,
        zero3=settings,
        new_head=False,
        workers=WorkerGroup.current(),
    )


def load_damaged(folder: Path) -> None:
    """Load a model of which the second worker's files are damaged, and write what each worker says."""
    workers, mine = WorkerGroup.current(), folder / f"{DAMAGED}-{dist.get_rank()}"
    write_model("bert", mine)
    if not workers.is_main:
        (mine / "model.safetensors").write_bytes(b"")
    try:
        load_sharded("bert", mine)
    except ConfigError as error:
        (mine / "said.txt").write_text(str(error))
    dist.barrier()


_CARD: dict[str, Any] = {
    "name": "tiny",
    "model": "tiny",
    "method": "mgpp",
    "sparsity": SPARSITY,
    "num_pruned": 0,
    "num_prunable": 1,
    "metrics": {"pruned": {}},
    "num_rows": 1,
    "num_steps": STEPS,
    "prune_start": 1,
    "prune_end": 3,
    "config": "",
    "versions": {},
}


def main(name: str) -> None:
    folder = Path(name)
    dist.init_process_group("gloo")
    load_tokenizer(ModelConfig(path=str(folder / "tokenizer")))
    cases = {case: partial(prune, case, folder) for case in CASES}
    run_cases(folder, {DAMAGED: partial(load_damaged, folder), **cases}, seconds=120)
