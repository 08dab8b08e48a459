"""Run on ranks: how much memory a worker takes beyond its own as a model is written."""

import json
import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import deepspeed
import torch
import torch.distributed as dist
import transformers

from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.saving.model_files import write_model
from pipeline.training.deepspeed import ZeroConfig, deepspeed_config, init_deepspeed
from tests import tiny
from tests.pipeline.saving.saving_worker import context_of

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked
MIB = 1 << 20


def make_model(**sizes: Any) -> Any:
    """Return a random Llama."""
    torch.manual_seed(0)
    config = tiny.config("llama", vocab_size=64, num_key_value_heads=2, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def held(kind: str = "VmRSS") -> int:
    """Return the memory of this process, or its peak ("VmHWM") since `forget_peak`, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+) kB", text).group(1)) * 1024  # type: ignore[union-attr]


def forget_peak() -> None:
    """Begin a new peak."""
    Path("/proc/self/clear_refs").write_text("5")


def write(folder: Path, name: str, model: Any) -> dict[str, int]:
    """Write a model from ZeRO 3; return its size and how far memory rose."""
    size = sum(p.nbytes for p in model.parameters())
    zero = ZeroConfig(stage=3, precision="fp32", bucket_elements=10_000)
    settings = deepspeed_config(
        zero, micro_batch_size=1, accumulation=1, gradient_clipping=None, on_gpu=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "tokenizer")))
    forget_peak()
    before = held()
    context = context_of(folder / name)
    write_model(context, engine.module, tokenizer=tokenizer, prunable=(), round_bytes=4 * MIB)
    return {"size": size, "rise": held("VmHWM") - before}


def main(name: str) -> None:
    folder = Path(name)
    dist.init_process_group("gloo")
    init_deepspeed("gloo")
    write(folder, "small", make_model())  # what is imported and cached the first time
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 7}
    found = write(folder, "large", make_model(**sizes))
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)
