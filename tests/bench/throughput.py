"""Run by torchrun: tokens a second of the dense stage, or of `transformers.Trainer` with DeepSpeed.

The same model, rows, layout, precision and dtype of the reduction. Modes: "ours", "trainer".
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers

from pipeline.context import Context
from pipeline.models.source import ModelConfig
from pipeline.section import Duration
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tracking.recorder import Progress
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig, deepspeed_config, init_deepspeed
from pipeline.training.loop import train
from pipeline.worker_group import WorkerGroup
from tests import tiny
from tests.processes import leave


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a model, its batches and the run.

    Attributes:
        settings: of the GPT-2 configuration.
        rows: of a worker's micro-batch.
        length: tokens of each row.
        steps: taken; the first half warms up.
        precision: of the forward and backward pass.
    """

    settings: Mapping[str, int]
    rows: int
    length: int
    steps: int
    precision: str = "fp32"


_SMALL = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 8192, "bos_token_id": 0}
SMALL = Size(settings={**_SMALL, "eos_token_id": 0}, rows=8, length=64, steps=40)


@dataclass(frozen=True, kw_only=True)
class InMemory(Context):
    """Rows that were never written.

    Attributes:
        splits: lists of rows.
    """

    splits: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, splits: Mapping[str, Any], progress: Progress) -> "InMemory":
        """Return a context of this process's group that writes into a folder."""
        workers = WorkerGroup.current()
        output = folder / "output"
        output.mkdir(exist_ok=True)
        return cls(
            inputs={"data": folder},
            model_kwargs={},
            output=output,
            workers=workers,
            checkpoints=CheckpointStore(str(folder / "checkpoints"), workers),
            progress=progress,
            splits=splits,
        )

    def rows(self) -> Mapping[str, Any]:
        return self.splits


def write_model(folder: Path, size: Size) -> None:
    """Write a random GPT-2 of a size, and a tokenizer."""
    config = transformers.GPT2Config(n_positions=size.length, **size.settings)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tiny.decoder_tokenizer().save_pretrained(folder / "tokenizer")


def ours(folder: Path, size: Size) -> float:
    """Return tokens a second of the training stage."""
    seconds: list[float] = []

    def progress(record: dict[str, Any]) -> None:
        if "step_seconds" in record:
            seconds.append(record["step_seconds"])

    rows = [{"input_ids": row} for row in random_tokens(folder, size).tolist()]
    context = InMemory.of(folder, {"train": rows}, progress)
    workers = context.workers
    train(
        context,
        model_config=ModelConfig(path=str(folder / "model")),
        task=make_task(CausalLMConfig(type="causal-lm", max_length=size.length)),
        config=TrainConfig(
            length=Duration(size.steps),
            batch_size=size.rows * workers.world_size,
            log_every=1,
            checkpoint_every=None,
        ),
        zero=ZeroConfig(stage=2, precision=size.precision),
        prune=None,
    )
    return _rate(seconds, size, workers)


def theirs(folder: Path, size: Size) -> float:
    """Return tokens a second of Trainer."""
    workers = WorkerGroup.current()
    init_deepspeed(workers.backend)  # as ours, or Trainer compiles an operator for a minute
    on_gpu = workers.device.type == "cuda"
    settings = deepspeed_config(
        ZeroConfig(stage=2, precision=size.precision),
        micro_batch_size=size.rows,
        accumulation=1,
        gradient_clipping=None,
        on_gpu=on_gpu,
    )
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        since = math.nan

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - self.since)  # the next batch is made in between
            self.since = now

    trainer = transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            use_cpu=not on_gpu,
            per_device_train_batch_size=size.rows,
            max_steps=size.steps,
            deepspeed=settings,
            bf16=size.precision == "bf16",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[
            {"input_ids": row, "labels": row} for row in random_tokens(folder, size).tolist()
        ],
        data_collator=transformers.default_data_collator,
        callbacks=[Clock()],
    )
    trainer.train()
    return _rate(seconds, size, workers)


def random_tokens(folder: Path, size: Size) -> torch.Tensor:
    """Return int64 [rows, length]: the same tokens in every process."""
    vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (256, size.length), generator=generator)


def _rate(seconds: list[float], size: Size, workers: WorkerGroup) -> float:
    if not workers.is_main:
        return 0.0
    late = seconds[len(seconds) // 2 :]
    return size.rows * size.length * workers.world_size / median(late)


MODES = {"ours": ours, "trainer": theirs}


def main(mode: str, folder: str, out: str) -> None:
    """Measure one mode and write its figure."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rate = MODES[mode](Path(folder), SMALL)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(rate))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
