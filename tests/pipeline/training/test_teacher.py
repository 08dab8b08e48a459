"""A teacher beside its student: what each family of tasks learns, and teachers that do not fit."""

import shutil

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from pipeline.errors import ConfigError
from pipeline.models.source import ModelConfig
from pipeline.runs.validate import validate
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLM, CausalLMConfig
from pipeline.tasks.question_answering import QuestionAnsweringConfig
from pipeline.tasks.sequence import ClassificationConfig, RegressionConfig
from pipeline.tasks.text_to_text import TextToTextConfig
from pipeline.training.distill import DistillConfig
from pipeline.training.teacher import Distillation, mismatches, teacher_problems
from tests import tiny
from tests.run_file import write_run

TEMPERATURE, WEIGHT, HIDDEN_WEIGHT = 3.0, 0.7, 0.25
SIZES = {
    "vocab_size": 20,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "initializer_range": 0.5,
}
IDS = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
LABELS = torch.where(IDS % 3 == 0, -100, IDS)
TARGETS = LABELS[:, :5].contiguous()
UNPADDED = torch.ones_like(MASK)


class MaskedLM(CausalLM):
    """A family that says no more of distillation than its auto class."""

    auto_model = "AutoModelForMaskedLM"


def random_model(kind, **changes):
    """Make one of another seed with each call."""
    return lambda: tiny.model(kind, seed=None, **SIZES, **changes)


CAUSAL = CausalLMConfig(type="causal-lm")
SEQUENCE = {"text": ["text"], "label": "label"}
# family: task, model, inputs besides the tokens, (output, row, position) of every prediction.
EVERY = [(row, token) for row in range(3) for token in range(6)]
LABELLED = [(row, token) for row, token in EVERY if LABELS[row, token] != -100]
FAMILIES = {
    "classification": (
        make_task(ClassificationConfig(type="classification", **SEQUENCE)),
        random_model(BertForSequenceClassification, num_labels=3),
        {"attention_mask": MASK, "labels": torch.tensor([0, 2, 1])},
        [("logits", (row,)) for row in range(3)],
    ),
    "question-answering": (
        make_task(QuestionAnsweringConfig(type="question-answering")),
        random_model(BertForQuestionAnswering),
        {
            "attention_mask": MASK,
            "start_positions": torch.tensor([1, 0, 2]),
            "end_positions": torch.tensor([2, 0, 4]),
        },
        [(f"{edge}_logits", (row,)) for edge in ("start", "end") for row in range(3)],
    ),
    "causal-lm": (
        make_task(CAUSAL),
        random_model(LlamaForCausalLM, attention_dropout=0.1),
        {"labels": IDS},
        [("logits", (row, token)) for row, token in EVERY if token < 5],
    ),
    "causal-lm of answers": (
        make_task(CAUSAL),
        random_model(LlamaForCausalLM, attention_dropout=0.1),
        {"attention_mask": UNPADDED, "labels": LABELS},
        [("logits", (row, token - 1)) for row, token in LABELLED if token],
    ),
    "masked-lm": (
        MaskedLM(CAUSAL),
        random_model(BertForMaskedLM),
        {"attention_mask": MASK, "labels": LABELS},
        [("logits", at) for at in LABELLED],
    ),
    "text-to-text": (
        make_task(TextToTextConfig(type="text-to-text", source="a", target="b")),
        random_model(
            T5ForConditionalGeneration,
            initializer_factor=5.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        {"attention_mask": MASK, "labels": TARGETS},
        [("logits", at) for at in LABELLED if at[1] < 5],
    ),
}


def pair_of(make):
    torch.manual_seed(1)
    return make().train(), make().eval()  # student and teacher, of different weights


def distillation(task, teacher, **changes):
    settings = {"weight": WEIGHT, "temperature": TEMPERATURE, "hidden_weight": HIDDEN_WEIGHT}
    return Distillation(config=DistillConfig(**{**settings, **changes}), task=task, teacher=teacher)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_what_its_loss_predicts(family):
    task, make, inputs, predictions = FAMILIES[family]
    student, teacher = pair_of(make)
    batch = {"input_ids": IDS, **inputs}
    torch.manual_seed(2)
    losses = distillation(task, teacher).losses(student, batch)
    drawn_after = torch.get_rng_state()

    torch.manual_seed(2)  # the student's dropout is what it is without a teacher
    of_student = student(**batch, output_hidden_states=True)
    assert torch.equal(torch.get_rng_state(), drawn_after)
    assert torch.equal(losses["task_loss"], of_student.loss)
    with torch.no_grad():
        of_teacher = teacher(**batch, output_hidden_states=True)
    found = []
    for output, at in predictions:
        logits = (
            outputs[output][at].detach().double().numpy() for outputs in (of_teacher, of_student)
        )
        found.append(rel_entr(*(softmax(of_one / TEMPERATURE) for of_one in logits)).sum())
    assert losses["distill_loss"].item() == pytest.approx(TEMPERATURE**2 * np.mean(found), rel=1e-4)
    total = (1 - WEIGHT) * losses["task_loss"] + WEIGHT * losses["distill_loss"]
    total += HIDDEN_WEIGHT * losses["hidden_loss"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_computes_no_loss_of_tokens_that_nothing_uses(family):
    task, make, inputs, _ = FAMILIES[family]
    student, teacher = pair_of(make)
    losses = []
    teacher.register_forward_hook(lambda *done: losses.append(done[-1].loss))
    distillation(task, teacher).losses(student, {"input_ids": IDS, **inputs})
    (loss,) = losses
    # Where a decoder's inputs are made of labels, they are given; positions of answers cost nothing.
    assert (loss is None) == (family not in ("text-to-text", "question-answering"))


def test_regression_learns_by_squared_error():
    task = make_task(RegressionConfig(type="regression", **SEQUENCE))
    student, teacher = pair_of(random_model(BertForSequenceClassification, num_labels=1))
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0.1, 2.0, -1.0])}
    losses = distillation(task, teacher, hidden_weight=0).losses(student.eval(), batch)
    of_student, of_teacher = (m(**batch).logits.detach().numpy() for m in (student, teacher))
    expected = np.mean((of_student - of_teacher) ** 2)
    assert losses["distill_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert "hidden_loss" not in losses


@pytest.mark.parametrize("family", ["masked-lm", "text-to-text"])
def test_hidden_states_of_every_layer_and_token(family):
    task, make, inputs, _ = FAMILIES[family]
    student, teacher = pair_of(make)
    batch = {"input_ids": IDS, **inputs}
    losses = distillation(task, teacher).losses(student.eval(), batch)
    of_student, of_teacher = (m(**batch, output_hidden_states=True) for m in (student, teacher))
    masks = {"hidden_states": MASK}
    if family == "text-to-text":
        masks = {"encoder_hidden_states": MASK, "decoder_hidden_states": TARGETS != -100}
    means = []
    for name, mask in masks.items():
        layers = zip(of_student[name][1:], of_teacher[name][1:], strict=True)
        cosines = [torch.cosine_similarity(a, b, dim=-1)[mask.bool()] for a, b in layers]
        assert len(cosines) == 2
        means.append((2 - 2 * torch.stack(cosines)).mean().item())
    assert losses["hidden_loss"].item() == pytest.approx(np.mean(means), rel=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    task, make, inputs, _ = FAMILIES["classification"]
    teacher = make().eval()
    losses = distillation(task, teacher).losses(teacher, {"input_ids": IDS, **inputs})
    assert losses["distill_loss"].item() == pytest.approx(0, abs=1e-6)
    assert losses["hidden_loss"].item() == pytest.approx(0, abs=1e-6)


# Teachers that do not fit.


def fits(student, teacher, *, heads=True, **settings):
    student, teacher = (
        tiny.config("bert", **{**SIZES, **changes}) for changes in (student, teacher)
    )
    return mismatches(student, teacher, DistillConfig(**settings), heads=heads)


def test_sizes_that_differ_are_named_with_both():
    assert fits({}, {}) == []
    (problem,) = fits({"vocab_size": 30}, {"vocab_size": 40})
    assert problem == "has 40 tokens in its vocabulary, the model that learns 30"
    (problem,) = fits({"num_labels": 2}, {"num_labels": 3})
    assert problem == "has 3 labels, the model that learns 2"
    assert fits({"num_labels": 2}, {"num_labels": 3}, heads=False) == []
    wider = {"num_hidden_layers": 3, "hidden_size": 32}
    assert fits({}, wider) == []
    assert fits({}, wider, hidden_weight=1.0) == [
        "has 3 layers, the model that learns 2",
        "has 32 units of width, the model that learns 16",
    ]


def test_labels_in_another_order_are_told():
    ours, theirs = (
        {"id2label": dict(enumerate(names))} for names in (("yes", "no"), ("No", "Yes"))
    )
    (problem,) = fits(ours, theirs)
    assert problem == "has the labels ['No', 'Yes'], the model that learns ['yes', 'no']"
    other = {"id2label": dict(enumerate(("yes", "not")))}
    assert fits(ours, other) == [
        "has the labels ['yes', 'not'], the model that learns ['yes', 'no']"
    ]
    spaced = {"id2label": dict(enumerate(("Yes ", " no")))}
    assert fits(ours, spaced) == []
    assert fits(ours, ours) == []
    assert fits(ours, {"num_labels": 2}) == []  # LABEL_0, LABEL_1: nothing is known of them


@pytest.fixture
def teachers(tiny_bert, tmp_path):
    """Makes a fine-tuned teacher of the tiny BERT's tokenizer."""

    def make(name, kind=BertForSequenceClassification, **changes):
        config = BertConfig.from_pretrained(tiny_bert, **changes)
        kind(config).save_pretrained(tmp_path / name)
        for file in tiny_bert.glob("*token*"):
            shutil.copy(file, tmp_path / name)
        return str(tmp_path / name)

    return make


def problems_of(teacher, tiny_bert, **settings):
    student = ModelConfig(path=str(tiny_bert))
    config = DistillConfig(teacher=teacher, **settings)
    found = teacher_problems(config, student, "AutoModelForSequenceClassification")
    return [str(problem) for problem in found]


def test_a_teacher_is_checked_before_anything_starts(teachers, tiny_bert, tmp_path):
    assert problems_of("dense", tiny_bert) == []
    assert problems_of(teachers("good"), tiny_bert) == []
    (problem,) = problems_of(str(tmp_path / "none"), tiny_bert)
    assert problem.startswith(f"distill.teacher: no tokenizer in '{tmp_path}/none'")
    (problem,) = problems_of(teachers("headless", BertForMaskedLM), tiny_bert)
    assert "is a BertForMaskedLM, not a BertForSequenceClassification" in problem
    (problem,) = problems_of(teachers("wordy", vocab_size=99), tiny_bert)
    assert "has 99 tokens in its vocabulary, the model that learns 25" in problem
    (problem,) = problems_of(teachers("deep", num_hidden_layers=3), tiny_bert, hidden_weight=1)
    assert "has 3 layers, the model that learns 2" in problem
    other = teachers("other")
    words = tmp_path / "other" / "tokenizer.json"
    words.write_text(words.read_text().replace('"great"', '"grand"'))
    (problem,) = problems_of(other, tiny_bert)
    assert f"has another tokenizer than model.path, {str(tiny_bert)!r}" in problem
    empty = tmp_path / "good" / "model.safetensors"
    empty.unlink()
    (problem,) = problems_of(str(tmp_path / "good"), tiny_bert)
    assert problem.startswith("distill.teacher: ")
    assert "has no weights" in problem
    assert "random_init" not in problem


@pytest.mark.usefixtures("datasets_cache")
def test_validation_names_the_key(tiny_bert, words_csv, tmp_path):
    path = write_run(tmp_path, tiny_bert, words_csv, distill={"teacher": "dense"})
    assert validate(str(path), [], None).distill == DistillConfig()
    assert validate(str(path), ["distill=null"], None).distill is None
    for override, start in (
        ("dense.enabled=false", "distill.teacher: got 'dense'; dense.enabled is false"),
        ("distill.teacher=nowhere", "distill.teacher: no tokenizer in 'nowhere'"),
        ("distill.weight=2", "distill.weight: "),
        ("distill.weigth=1", "distill.weigth: unknown key; allowed are teacher, "),
    ):
        with pytest.raises(ConfigError) as raised:
            validate(str(path), [override], None)
        (problem,) = map(str, raised.value.problems)
        assert problem.startswith(start)
