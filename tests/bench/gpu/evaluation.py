"""The evaluation stage on the device: its loss beside transformers' own, and its peak of memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers

from pipeline.evaluation.evaluate import EvaluateConfig, evaluate
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.training.deepspeed import ZeroConfig
from tests.bench.gpu.figures import Figure
from tests.bench.gpu.process import start_group
from tests.bench.throughput import InMemory, Size, random_tokens, write_model


def measure(size: Mapping[str, Any], device: torch.device, folder: Path) -> Iterator[Figure]:
    """Score a random GPT-2 on random tokens."""
    size = dict(size)
    num_batches = size.pop("batches")
    of_model = Size(**size)
    start_group(device.type)
    write_model(folder, of_model)
    tokens = random_tokens(folder, of_model)[: num_batches * of_model.rows]
    rows = [{"input_ids": row, "tokens_per_word": 1.0} for row in tokens.tolist()]
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = evaluate(
        InMemory.of(folder, {"validation": rows}, lambda _: None),
        models={"dense": folder / "model"},
        task=make_task(CausalLMConfig(type="causal-lm", max_length=of_model.length)),
        config=EvaluateConfig(batch_size=of_model.rows),
        zero=ZeroConfig(precision=of_model.precision),
        trust_remote_code=False,
    )
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").to(device)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    with torch.inference_mode():
        losses = [
            float(model(input_ids=part.to(device), labels=part.to(device)).loss)
            for part in tokens.split(1)
        ]
    loss = found["dense"]["loss"]
    assert loss is not None
    yield Figure(
        key="evaluation_loss",
        text="how far the loss in bf16 is from that of transformers in float32, as a share of it",
        value=abs(loss / fmean(losses) - 1),
        limit="<= 0.01",
    )
    logits = of_model.rows * of_model.length * model.config.vocab_size
    yield Figure(
        key="evaluation_peak_bytes",
        text="peak memory of the evaluation",
        value=None if peak is None else float(peak),
    )
    yield Figure(
        key="evaluation_peak_logits",
        text="what of it lies beyond the weights, over a batch's logits in float32",
        value=None if peak is None else (peak - 2 * num_weights) / (4 * logits),
        limit="<= 0.4",
    )
