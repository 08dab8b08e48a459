"""Losses over rows with unequal numbers of targets: the same on any ranks and in any micro-batches.

What is compared with is a loop of plain torch that sees the whole batch at once.
"""

import random
from functools import cache
from itertools import islice

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

import mgpp
from pipeline.tasks import make_task
from pipeline.tracking.recorder import read_records
from tests import tiny
from tests.cases import launch_cases
from tests.pipeline.training.unequal_worker import (
    BATCH_SIZE,
    CUTS,
    DISTILL,
    DISTILLED,
    FAMILIES,
    NUM_STEPS,
    PRUNE,
    TASKS,
    TRAIN,
    name_of,
)
from tests.tiny import BAD, DAY_WORDS, GOOD

pytestmark = pytest.mark.distributed

WORDS = ["red", "green", "blue", "one", "two"]
LENGTHS = (1, 3, 25)  # words of an answer
HEADS = {
    "instruction": (AutoModelForCausalLM, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "masked-lm": (
        AutoModelForMaskedLM,
        BertForMaskedLM,
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "text-to-text": (
        AutoModelForSeq2SeqLM,
        T5ForConditionalGeneration,
        {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
}


def texts(kind, num_rows=40):
    draw = random.Random(1)
    if kind == "masked-lm":
        words = [*GOOD, *BAD, "a", "day", "not"]
        return {"text": [" ".join(draw.choices(words, k=30)) for _ in range(num_rows)]}
    return {
        "prompt": [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(num_rows)],
        "answer": [" ".join(draw.choices(WORDS, k=draw.choice(LENGTHS))) for _ in range(num_rows)],
    }


def write_family(kind, folder):
    """Write a model, its teacher and the data stage's folder."""
    _, head, changes = HEADS[kind]
    size = len(DAY_WORDS) if kind == "masked-lm" else len(tiny.SEQUENCE_WORDS)
    for name, seed in (("model", 0), ("teacher", 1)):
        tiny.model(head, seed=seed, vocab_size=size, **changes).save_pretrained(folder / name)
    if kind == "masked-lm":
        tiny.write_bert(folder / "tokenizer", DAY_WORDS)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    else:
        tokenizer = tiny.sequence_tokenizer()
    for name in ("model", "teacher", "data/tokenizer"):
        tokenizer.save_pretrained(folder / name)
    rows = Dataset.from_dict(texts(kind))
    task = make_task(TASKS[kind])
    splits = task.tokenize(DatasetDict(train=rows, validation=rows), tokenizer, None).splits
    splits.save_to_disk(str(folder / "data" / "dataset"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unequal")
    for kind in TASKS:
        write_family(kind, folder / kind)
    outcome = None
    for ranks in sorted({cut[0] for cut in CUTS}):
        found = launch_cases(
            "tests.pipeline.training.unequal_worker",
            str(folder),
            cases=[name_of(family, *cut) for cut in CUTS if cut[0] == ranks for family in FAMILIES],
            folder=folder / "out",
            num_processes=ranks,
            timeout=200,
        )
        outcome = found if outcome is None else outcome | found
    return outcome


@cache
def reference(root, family):
    """Train on whole batches, with losses in float64; return weights and losses of the steps."""
    kind = family.removeprefix("distilled-")
    auto = HEADS[kind][0]
    model = auto.from_pretrained(root / kind / "model").train()
    teacher = auto.from_pretrained(root / kind / "teacher").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (kind == "masked-lm" and name.endswith("bias")))
    rows = load_from_disk(str(root / kind / "data" / "dataset"))["train"]
    plan = TRAIN.batch_plan(num_rows=len(rows), world_size=1)
    task = make_task(TASKS[kind])
    collate = task.collator(AutoTokenizer.from_pretrained(root / kind / "model"))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=TRAIN.lr,
        betas=TRAIN.betas,
        eps=TRAIN.eps,
        weight_decay=0.0,
    )
    mgpp.attach((model, optimizer), PRUNE.settings, NUM_STEPS, len(rows))
    losses = []
    for drawn in islice(plan.drawn_micro_batches(0, 0), NUM_STEPS):
        assert len(drawn) == BATCH_SIZE
        batch = collate(
            [
                {**rows[i], **({"draw_seed": seed} if kind == "masked-lm" else {})}
                for i, seed in drawn
            ]
        )
        of_student = model(**batch, output_hidden_states=True)
        with torch.no_grad():
            of_teacher = teacher(**batch, output_hidden_states=True)
        loss = task_loss = cross_entropy(kind, of_student, batch)
        if family in DISTILLED:
            loss = 0.5 * task_loss + 0.5 * divergence(kind, of_student, of_teacher, batch)
            loss = loss + DISTILL.hidden_weight * hidden_distance(
                kind, of_student, of_teacher, batch
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {name: p.detach() for name, p in model.state_dict().items()}, losses


def predictions(kind, outputs, batch):
    """Return logits in float64 and labels of what is predicted."""
    logits, labels = outputs.logits.double(), batch["labels"]
    if kind == "instruction":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels >= 0], labels[labels >= 0]


def cross_entropy(kind, outputs, batch):
    logits, labels = predictions(kind, outputs, batch)
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum() / len(labels)


def divergence(kind, of_student, of_teacher, batch):
    ours, theirs = (
        (predictions(kind, outputs, batch)[0] / DISTILL.temperature).log_softmax(-1)
        for outputs in (of_student, of_teacher)
    )
    return DISTILL.temperature**2 * (theirs.exp() * (theirs - ours)).sum() / len(ours)


def hidden_distance(kind, of_student, of_teacher, batch):
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
    stacks = {"hidden_states": attended}
    if kind == "text-to-text":
        stacks = {"encoder_hidden_states": attended, "decoder_hidden_states": batch["labels"] >= 0}
    means = []
    for name, mask in stacks.items():
        layers = zip(of_student[name][1:], of_teacher[name][1:], strict=True)
        cosines = [torch.cosine_similarity(a.double(), b.double(), dim=-1)[mask] for a, b in layers]
        means.append((2 - 2 * torch.stack(cosines)).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_that_of_the_whole_batch(launched, family, cut):
    out = launched.folder(name_of(family, *cut))
    expected, losses = reference(out.parent, family)
    folder = out / name_of(family, *cut)
    found = load_file(folder / "model" / "model.safetensors")
    for name, weight in expected.items():
        if name in found:  # tied weights are written once
            assert (found[name] - weight).abs().max() < 1e-5, name
            assert torch.equal(found[name] == 0, weight == 0), name
    assert sum(int((weight == 0).sum()) for weight in found.values()) > 1000
    recorded = [record["loss"] for record in read_records(folder / "metrics.jsonl")["step"]]
    assert recorded == pytest.approx(losses, abs=1e-5)
