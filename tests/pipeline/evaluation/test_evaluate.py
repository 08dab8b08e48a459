"""The evaluation stage: its batches, workers that share a model, and scores that do not exist."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline.context import Context
from pipeline.evaluation import evaluate as module
from pipeline.evaluation.evaluate import EvaluateConfig, evaluate, token_batches
from pipeline.evaluation.head import TokenScorer
from pipeline.models.source import ModelConfig
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tasks.sequence import RegressionConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.training.engine import make_inference_model
from pipeline.worker_group import WorkerGroup
from tests import tiny
from tests.cases import launch_cases
from tests.pipeline.evaluation.sharded_worker import CASES, KINDS, VOCABULARY


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


def test_a_model_is_given_no_labels_and_keeps_no_keys_and_values(tmp_path):
    tiny.write_decoder("llama", tmp_path)
    zero, task = ZeroConfig(stage=0, precision="fp32"), make_task(CausalLMConfig(type="causal-lm"))
    workers = WorkerGroup.alone()
    model = make_inference_model(ModelConfig(path=str(tmp_path)), task, zero, 2, workers)
    given, kept = [], []
    model.register_forward_pre_hook(lambda *call: given.append(call[-1]), with_kwargs=True)
    model.model.register_forward_hook(lambda *done: kept.append(done[-1].past_key_values))
    ids = torch.randint(2, 30, (2, 6))
    scorer = TokenScorer(task=task, model=model, layers="model")
    scorer.infer({"input_ids": ids, "labels": ids}, workers.device)
    assert [list(inputs) for inputs in given] == [["input_ids"]]
    assert kept == [None]


def test_batches_are_bounded_by_rows_and_by_padded_tokens():
    tokens = [4, 4, 9, 2, 30, 1, 1, 1, 1]
    batches = token_batches(range(9), tokens, most_rows=3, most_tokens=18)
    assert batches == [[0, 1], [2, 3], [4], [5, 6, 7], [8]]
    assert token_batches(range(1, 9, 2), tokens, most_rows=9, most_tokens=100) == [[1, 3, 5, 7]]
    assert token_batches([], tokens, most_rows=3, most_tokens=18) == []


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 99))
def test_every_row_is_in_one_batch_and_none_is_too_large(tokens, most_rows, most_tokens):
    batches = token_batches(
        range(len(tokens)), tokens, most_rows=most_rows, most_tokens=most_tokens
    )
    assert [row for batch in batches for row in batch] == list(range(len(tokens)))
    for batch in batches:
        assert 1 <= len(batch) <= most_rows
        assert len(batch) == 1 or len(batch) * max(tokens[i] for i in batch) <= most_tokens


def test_rows_that_fill_a_default_batch_stay_as_they_were():
    for length in (1, 128, 1024):
        assert EvaluateConfig().rows_of(length) == 32
    assert EvaluateConfig().rows_of(2048) == 16
    assert EvaluateConfig().rows_of(10**6) == 1


LENGTHS = (12, 5, 9, 4, 11, 6, 3, 8, 7)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    DatasetDict(validation=Dataset.from_list(rows)).save_to_disk(str(folder / "data" / "dataset"))
    tiny.decoder_tokenizer().save_pretrained(folder / "data" / "tokenizer")
    sizes = {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "intermediate_size": 24}
    for kind in KINDS:
        settings = tiny.config(
            kind.removesuffix("-tied"), **sizes, tie_word_embeddings=kind != "llama"
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "layers" in name:
                parameter.data.mul_(8)
        model.save_pretrained(folder / kind)
    launched = launch_cases(
        "tests.pipeline.evaluation.sharded_worker",
        str(folder),
        cases=CASES,
        folder=folder,
        num_processes=2,
        timeout=400,
    )
    return launched, rows


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_workers_with_other_batches_find_the_loss_of_the_model_itself(sharded, case):
    launched, rows = sharded
    folder, (kind, stage) = launched.folder(case), CASES[case]
    found = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    model = AutoModelForCausalLM.from_pretrained(folder / kind).eval()
    total = number = 0
    with torch.inference_mode():
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            count = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * count
            number += count
    for metrics in found[0]["metrics"].values():
        assert metrics["num_tokens"] == number
        assert metrics["loss"] == pytest.approx(total / number, rel=2e-6)
    # One worker has a batch more, which under ZeRO 3 the other goes through with it.
    num_batches = [len(one["steps"]) // 2 for one in found]
    shares = [
        token_batches(range(rank, len(rows), 2), LENGTHS, most_rows=3, most_tokens=24)
        for rank in (0, 1)
    ]
    own = [len(share) for share in shares]
    assert own[0] != own[1]
    assert num_batches == (own if stage == 0 else [max(own)] * 2)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_head_is_gathered_once_for_all_slices_of_a_batch(sharded, kind):
    folder = sharded[0].folder(f"{kind}-stage3")
    found = json.loads((folder / f"{kind}-stage3-0.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / kind)
    whole = sum(2 * -(-p.numel() // 2) for p in model.parameters())
    half = len(found["gathered"]) // 2
    # The first batch of a model shows DeepSpeed the order of its modules; then nothing comes twice.
    of_batches = [b - a for a, b in pairwise(found["gathered"][:half])]
    assert min(of_batches) > 0
    assert max(of_batches[1:]) <= whole
