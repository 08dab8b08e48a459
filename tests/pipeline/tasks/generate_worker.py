"""Run on ranks: a random T5 writes texts, whole on each worker and sharded over them."""

import json
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist
from datasets import Dataset, DatasetDict
from transformers import T5ForConditionalGeneration

from pipeline.context import Context
from pipeline.evaluation.evaluate import EvaluateConfig, evaluate
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks.text_to_text import TextToText, TextToTextConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.worker_group import WorkerGroup
from tests import tiny
from tests.cases import run_cases
from tests.tiny import SEQUENCE_WORDS as WORDS

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked
# By default ZeRO 3 keeps weights as small as these whole, and nothing is gathered.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
STAGES = (0, 3)
ROWS = ["one two", "red", "green one blue", "two two", "blue", "red one", "two"]


def make_task_of(**changes: object) -> TextToText:
    """The task on the columns `article` and `summary`."""
    names = {"source": "article", "target": "summary"}
    return TextToText(TextToTextConfig(type="text-to-text", **{**names, **changes}))


def make_task() -> TextToText:
    # A greedy search takes as many steps as its text has tokens; beams may go on to the last.
    return make_task_of(max_target_length=10, num_beams=1)


def save_inputs(folder: Path) -> tuple[TextToText, T5ForConditionalGeneration, Dataset]:
    """Write a random model and the data stage's folder; its texts are of 1, 2 or 10 tokens."""
    model = tiny.model(
        T5ForConditionalGeneration,
        seed=5,
        vocab_size=len(WORDS),
        intermediate_size=32,
        initializer_factor=5.0,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=[2, 4, 5],
    ).eval()
    model.save_pretrained(folder / "model")
    rows = Dataset.from_dict({"article": ROWS, "summary": ROWS})
    tokenizer, task = tiny.sequence_tokenizer(), make_task()
    splits = DatasetDict(train=rows, validation=rows, other=rows.select(range(2, 5)))
    tokenized = task.tokenize(splits, tokenizer)
    tokenized.splits.save_to_disk(str(folder / "data" / "dataset"))
    tokenizer.save_pretrained(folder / "data" / "tokenizer")
    return task, model, tokenized.splits["validation"]


def evaluate_sharded(stage: int, folder: Path) -> None:
    workers = WorkerGroup.current()
    context = Context(
        inputs={"data": folder / "data"},
        model_kwargs={},
        output=folder,
        workers=workers,
        checkpoints=CheckpointStore(str(folder / "checkpoints"), workers),
        progress=lambda record: None,
    )
    metrics = evaluate(
        context,
        models={"model": folder / "model"},
        task=make_task(),
        config=EvaluateConfig(batch_size=1),
        zero=ZeroConfig(stage=stage, precision="fp32", extra=SHARD_ALL if stage == 3 else {}),
        trust_remote_code=False,
    )
    if dist.get_rank() == 0:
        (folder / f"metrics-{stage}.json").write_text(json.dumps(metrics))


def main(name: str) -> None:
    folder = Path(name)
    dist.init_process_group("gloo")
    cases = {f"stage{stage}": partial(evaluate_sharded, stage, folder) for stage in STAGES}
    run_cases(folder, cases, seconds=180)
