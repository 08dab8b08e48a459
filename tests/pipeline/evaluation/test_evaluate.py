"""Scores that do not exist: null in JSON, and a warning."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict

from pipeline.context import Context
from pipeline.evaluation import evaluate as module
from pipeline.evaluation.evaluate import EvaluateConfig, evaluate
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.sequence import RegressionConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.worker_group import WorkerGroup
from tests import tiny


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_a_metric_that_is_not_a_number_is_null_in_json_and_warned_of(tmp_path, monkeypatch):
    rows = Dataset.from_list(
        [{"input_ids": [4, 5], "attention_mask": [1, 1], "labels": float(i)} for i in range(5)]
    )
    DatasetDict(validation=rows).save_to_disk(str(tmp_path / "dataset"))
    tiny.sequence_tokenizer().save_pretrained(tmp_path / "tokenizer")
    numbers = {
        "dense": lambda ids: torch.arange(float(len(ids))),
        "pruned": lambda ids: torch.ones(len(ids)),
    }

    def load(config, *_):
        predict = numbers[config.path]
        return lambda input_ids, **_: SimpleNamespace(logits=predict(input_ids)[:, None])

    monkeypatch.setattr(module, "make_inference_model", load)
    monkeypatch.setattr(module, "init_deepspeed", lambda backend: None)
    workers, notes = WorkerGroup.alone(), []
    metrics = evaluate(
        Context(
            inputs={"data": tmp_path},
            model_kwargs={},
            output=tmp_path / "out",
            workers=workers,
            checkpoints=CheckpointStore(str(tmp_path / "checkpoints"), workers, keep=1),
            progress=notes.append,
        ),
        models={name: name for name in numbers},
        task=make_task(RegressionConfig(type="regression", text=["text"], label="label")),
        config=EvaluateConfig(batch_size=8),
        zero=ZeroConfig(precision="fp32"),
        trust_remote_code=False,
    )
    assert json.loads(json.dumps(metrics, allow_nan=False))["pruned"] == {
        "pearson": None,
        "spearman": None,
        "mse": 3.0,  # of 0 to 4 against 1: (1 + 0 + 1 + 4 + 9) / 5
    }
    assert metrics["dense"] == {"pearson": pytest.approx(1), "spearman": pytest.approx(1), "mse": 0}
    texts = [note["text"] for note in notes if note["event"] == "note"]
    assert texts == [
        "warning: pearson, spearman of the pruned model cannot be computed; null is recorded"
    ]
