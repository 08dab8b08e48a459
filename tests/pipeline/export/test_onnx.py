"""The ONNX copy: the same logits on real rows, the same zeros, sizes, and what is refused."""

import gzip
import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from datasets import Dataset, DatasetDict
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    GPT2Config,
    LongformerConfig,
)

import pipeline.export.onnx as exported
from mgpp import select_prunable
from pipeline.errors import StageError
from pipeline.export.checkpoint import ExportConfig
from pipeline.export.onnx import batches_of, is_encoder, onnx_problems, write_onnx
from pipeline.tasks import make_task
from pipeline.tasks.base import token_lengths
from pipeline.tasks.question_answering import QuestionAnsweringConfig
from pipeline.tasks.sequence import ClassificationConfig
from tests import tiny

pytestmark = pytest.mark.slow

CLASSIFY = ClassificationConfig(type="classification", text=["text"], label="label")
ANSWER = QuestionAnsweringConfig(
    type="question-answering", max_length=16, stride=2, max_answer_length=4
)
TEXTS = ["a good day", "bad", "a day not good", "a sad and dull day", "lovely", "not a kind day"]
HEAD = "AutoModelForSequenceClassification"


def prune(model):
    """Set two of three prunable weights to zero; return the names."""
    names = select_prunable(model)
    with torch.no_grad():
        for name in names:
            flat = model.get_parameter(name).view(-1)
            flat[0::3] = flat[1::3] = 0.0
    return names


def write(folder, model, tokenizer):
    names = prune(model)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("# tiny\n", encoding="utf-8")
    return names


def batches(task, rows, tokenizer):
    splits = DatasetDict(train=rows, validation=rows)
    tokenized = task.tokenize(splits, tokenizer).splits["validation"]
    return batches_of(tokenized, token_lengths(tokenized).tolist(), task.collator(tokenizer))


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tokenizer):
    """The output of an export, with its figures, the names of what is pruned, and the batches."""
    output = tmp_path_factory.mktemp("classifier")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": len(tokenizer)}
    model = tiny.model(BertForSequenceClassification, num_labels=3, **sizes)
    names = write(output, model.to(torch.bfloat16), tokenizer)
    rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2] * 2})
    made = batches(make_task(CLASSIFY), rows, tokenizer)
    kwargs = {"prunable": names, "trust_remote_code": False}
    found = write_onnx(output, HEAD, made, int8=True, **kwargs)
    return output, found, names, made


def tensors_of(path):
    return [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]


def test_a_classifier_gives_the_logits_of_torch_on_texts(classifier):
    output, found, *_ = classifier
    folder = output / "onnx"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    model = AutoModelForSequenceClassification.from_pretrained(
        output / "model", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for texts in ([TEXTS[1]], TEXTS, TEXTS[2:5]):
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        (logits,) = session.run(["logits"], {name: v.numpy() for name, v in inputs.items()})
        want = model.eval()(**inputs).logits.detach().numpy()
        np.testing.assert_allclose(logits, want, atol=1e-4, rtol=0)
    assert 0 <= found["onnx_difference"] <= 1e-4


def test_the_zeros_of_the_plain_checkpoint_are_in_the_file(classifier):
    output, found, names, _ = classifier
    plain = load_file(output / "model" / "model.safetensors")
    zeros = {name: int((plain[name] == 0).sum()) for name in names}
    assert found["onnx_num_zeros"] == sum(zeros.values()) > 0
    sizes = {plain[name].numel() for name in names}
    for file in ("model.onnx", "model_int8.onnx"):
        matrices = [t for t in tensors_of(output / "onnx" / file) if t.ndim == 2]
        counted = sum(int((t == 0).sum()) for t in matrices if t.size in sizes)
        assert counted >= found["onnx_num_zeros"], file
    pruned = {tuple(sorted(plain[name].shape)) for name in names}
    of_those = [t for t in tensors_of(output / "onnx" / "model.onnx") if t.ndim == 2]
    counted = sorted(
        int((t == 0).sum()) for t in of_those if tuple(sorted(t.shape)) in pruned and (t == 0).any()
    )
    assert counted == sorted(zeros.values())


def test_sizes_are_those_of_the_files_plain_and_as_gzip_packs_them(classifier):
    output, found, *_ = classifier
    for name, file in (("onnx", "model.onnx"), ("onnx_int8", "model_int8.onnx")):
        data = (output / "onnx" / file).read_bytes()
        assert found[f"{name}_bytes"] == len(data)
        packed = len(gzip.compress(data, 6))
        assert abs(found[f"{name}_compressed_bytes"] - packed) < 64  # headers
    assert found["onnx_compressed_bytes"] < 0.6 * found["onnx_bytes"]
    assert found["onnx_int8_bytes"] < 0.6 * found["onnx_bytes"]


def test_the_int8_file_comes_near(classifier):
    output, found, _, made = classifier
    session = onnxruntime.InferenceSession(output / "onnx" / "model_int8.onnx")
    model = AutoModelForSequenceClassification.from_pretrained(
        output / "model", dtype=torch.float32
    )
    largest = 0.0
    for batch in made:
        (logits,) = session.run(None, {name: v.numpy() for name, v in batch.items()})
        largest = max(largest, np.abs(logits - model(**batch).logits.detach().numpy()).max())
    assert found["onnx_int8_difference"] == pytest.approx(largest, abs=1e-6)
    assert found["onnx_difference"] < largest < 0.1


def test_the_lines_of_the_card_run(classifier):
    output, *_ = classifier
    card = (output / "onnx" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# tiny\n")
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    known = {"AutoTokenizer": AutoTokenizer, "onnxruntime": onnxruntime}
    known["FOLDER"] = str(output / "onnx")
    exec(lines, known)
    assert known["logits"].shape == (1, 3)
    config = json.loads((output / "onnx" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert not list((output / "onnx").glob("*.safetensors"))


def test_logits_that_differ_are_seen(classifier):
    """The file is compared with a model of which one number is another."""
    output, _, _, made = classifier
    model = AutoModelForSequenceClassification.from_pretrained(
        output / "model", dtype=torch.float32
    ).eval()
    path, names = output / "onnx" / "model.onnx", ("logits",)
    assert exported._difference(path, model, made, names) <= 1e-4
    with torch.no_grad():
        model.classifier.bias[0] += 0.01
    assert exported._difference(path, model, made, names) == pytest.approx(0.01, abs=1e-4)
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    assert not exported._difference(path, model, made, names) <= 1e-4


def test_zeros_that_are_lost_fail_the_export(classifier):
    output, _, names, _ = classifier
    plain = load_file(output / "model" / "model.safetensors")
    parameters = {name: plain[name].float() for name in names}
    parameters[names[0]].view(-1)[0] = 1.0
    with pytest.raises(StageError, match=re.escape(f"the numbers of {names[0]}: its zeros")):
        exported._num_zeros(output / "onnx" / "model.onnx", parameters)


def test_question_answering_has_both_logits(tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    model = tiny.model(DistilBertForQuestionAnswering, num_hidden_layers=1, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer.name_or_path, model_input_names=["input_ids", "attention_mask"]
    )
    names = write(tmp_path, model, tokenizer)
    texts = ["a good day not a bad day", "a day"] * 3 + ["a sad dull day a day a day a day a day"]
    answers = [{"text": ["day"], "answer_start": [text.index("day")]} for text in texts]
    rows = Dataset.from_dict({"question": ["good"] * 7, "context": texts, "answers": answers})
    made = batches(make_task(ANSWER), rows, tokenizer)
    assert len({len(batch["input_ids"]) for batch in made}) > 1
    assert len({batch["input_ids"].shape[1] for batch in made}) > 1
    kwargs = {"int8": False, "prunable": names, "trust_remote_code": False}
    auto = "AutoModelForQuestionAnswering"
    found = write_onnx(tmp_path, auto, made, **kwargs)
    assert found.keys() == {f"onnx_{n}" for n in ("num_zeros", "difference", "bytes")} | {
        "onnx_compressed_bytes"
    }
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert [each.name for each in session.get_outputs()] == ["start_logits", "end_logits"]
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    inputs = tokenizer(["good"] * 2, texts[:2], padding=True, return_tensors="pt")
    want, got = loaded(**inputs), session.run(None, {n: v.numpy() for n, v in inputs.items()})
    for expected, logits in zip((want.start_logits, want.end_logits), got, strict=True):
        np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4, rtol=0)


def test_batches_are_of_several_sizes_and_lengths_even_of_like_rows():
    rows = [{"input_ids": [1, 2, 3, 4], "labels": 0}]
    collate = make_collate()
    made = batches_of(rows, [4], collate)
    assert all(batch.keys() == {"input_ids"} for batch in made)
    assert {batch["input_ids"].shape for batch in made} == {(1, 4), (2, 4), (1, 2)}


def make_collate():
    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    return collate


# What is refused.


def refused(settings, auto=HEAD, kind="classification"):
    names = ["input_ids", "attention_mask"]
    found = onnx_problems(settings, auto, kind, names=names, trust_remote_code=False)
    return [str(problem) for problem in found]


@pytest.mark.parametrize("settings", [GPT2Config(), BartConfig(), BertConfig(is_decoder=True)])
def test_a_decoder_is_refused(settings):
    assert refused(settings) == [
        "export.format: only encoders with a classification or question-answering head are exported "
        f"to ONNX; {settings.model_type} has a decoder, got 'onnx'; leave it out"
    ]


def test_other_tasks_are_refused():
    (problem,) = refused(BertConfig(), "AutoModelForMaskedLM", "masked-lm")
    assert "exported to ONNX, not task.type masked-lm, got 'onnx'" in problem


def test_encoders_are_known():
    assert is_encoder(BertConfig())
    assert is_encoder(DistilBertConfig())
    assert not is_encoder(GPT2Config())


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(exported, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert refused(BertConfig()) == [
        "export.format: needs onnxscript, got 'onnx'; pip install 'mgpp[onnx]'"
    ]


def test_a_model_that_torch_cannot_export_is_refused_before_a_run(capfd):
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    settings = LongformerConfig(attention_window=8, hidden_size=32, vocab_size=128, **sizes)
    (problem,) = refused(settings)
    assert problem.startswith("export.format: torch cannot export longformer to ONNX: ")
    assert len(problem) < 500
    assert capfd.readouterr().err == ""


def test_int8_needs_the_format():
    with pytest.raises(ValueError, match=r"onnx_int8.*add onnx to export\.format"):
        ExportConfig(onnx_int8=True)
    assert ExportConfig(format=("plain", "onnx", "packed"), onnx_int8=True).onnx_int8
