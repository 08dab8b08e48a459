"""Losses over rows with unequal numbers of targets: the same on any ranks and in any micro-batches.

What is compared with is a loop of plain torch that sees the whole batch at once.
"""

import random
from functools import cache
from itertools import islice

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    T5ForConditionalGeneration,
)

import mgpp
from pipeline.tasks import make_task
from pipeline.tracking.recorder import read_records
from tests import tiny
from tests.cases import launch_cases
from tests.pipeline.training.unequal_worker import (
    BATCH_SIZE,
    CASES,
    DISTILL,
    DISTILLED,
    NUM_STEPS,
    PRUNE,
    ROUTED_ROWS,
    TASKS,
    TRAIN,
    name_of,
)
from tests.tiny import BAD, DAY_WORDS, GOOD

pytestmark = pytest.mark.distributed

WORDS = ["red", "green", "blue", "one", "two"]
LENGTHS = (1, 3, 25)  # words of an answer
LLAMA = (AutoModelForCausalLM, LlamaForCausalLM, {"num_key_value_heads": 2})
ROUTER_WEIGHT = 0.5
HEADS = {
    "instruction": LLAMA,
    "causal-lm": LLAMA,
    "routed": (
        AutoModelForCausalLM,
        MixtralForCausalLM,
        {
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "output_router_logits": True,
            "router_aux_loss_coef": ROUTER_WEIGHT,
        },
    ),
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
    if kind == "causal-lm":
        return {"text": [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(40)]}
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
    splits = task.tokenize(DatasetDict(train=rows, validation=rows), tokenizer).splits
    splits.save_to_disk(str(folder / "data" / "dataset"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other take longer over such models than all the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unequal")
    for kind in TASKS:
        write_family(kind, folder / kind)
    outcome = None
    for ranks in sorted({case[1] for case in CASES}):
        found = launch_cases(
            "tests.pipeline.training.unequal_worker",
            str(folder),
            cases=[name_of(*case) for case in CASES if case[1] == ranks],
            folder=folder / "out",
            num_processes=ranks,
            timeout=200,
        )
        outcome = found if outcome is None else outcome | found
    return outcome


@cache
def reference(root, family):
    """Train on whole batches, with losses in float64; return weights and losses of the steps.

    A batch is one micro-batch, but where routers have a loss of each: there it is cut, on one rank.
    """
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
        of_batch = [
            {**rows[i], **({"draw_seed": seed} if kind == "masked-lm" else {})} for i, seed in drawn
        ]
        if kind == "routed":
            loss = routed_loss(model, collate, of_batch)
        else:
            loss = whole_loss(family, model, teacher, collate(of_batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {name: p.detach() for name, p in model.state_dict().items()}, losses


def whole_loss(family, model, teacher, batch):
    kind = family.removeprefix("distilled-")
    of_student = model(**batch, output_hidden_states=True)
    loss = mean_cross_entropy(kind, of_student, batch)
    if family in DISTILLED:
        with torch.no_grad():
            of_teacher = teacher(**batch, output_hidden_states=True)
        loss = 0.5 * loss + 0.5 * divergence(kind, of_student, of_teacher, batch)
        distance = hidden_distance(kind, of_student, of_teacher, batch)
        loss = loss + DISTILL.hidden_weight * distance
    return loss


def routed_loss(model, collate, of_batch):
    """Return the mean over all targets, and the mean over micro-batches of what routers add."""
    total, num_targets, of_routers = 0.0, 0, []
    for begin in range(0, BATCH_SIZE, ROUTED_ROWS):
        batch = collate(of_batch[begin : begin + ROUTED_ROWS])
        outputs = model(**batch)
        losses = cross_entropies("routed", outputs, batch)
        total, num_targets = total + losses.sum(), num_targets + len(losses)
        of_routers.append(outputs.aux_loss)
    return total / num_targets + ROUTER_WEIGHT * torch.stack(of_routers).double().mean()


def predictions(kind, outputs, batch):
    """Return logits in float64 and labels of what is predicted."""
    logits, labels = outputs.logits.double(), batch["labels"]
    if HEADS[kind][0] is AutoModelForCausalLM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels >= 0], labels[labels >= 0]


def cross_entropies(kind, outputs, batch):
    logits, labels = predictions(kind, outputs, batch)
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels]


def mean_cross_entropy(kind, outputs, batch):
    losses = cross_entropies(kind, outputs, batch)
    return losses.sum() / len(losses)


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


@pytest.mark.parametrize("case", CASES, ids=[name_of(*case) for case in CASES])
def test_the_model_is_that_of_the_whole_batch(launched, case):
    family, name = case[0], name_of(*case)
    out = launched.folder(name)
    expected, losses = reference(out.parent, family)
    auto = HEADS[family.removeprefix("distilled-")][0]
    found = auto.from_pretrained(out / name / "model").state_dict()
    assert found.keys() == expected.keys()
    for weight, value in expected.items():
        assert (found[weight] - value).abs().max() < 1e-5, weight
        assert torch.equal(found[weight] == 0, value == 0), weight
    assert sum(int((value == 0).sum()) for value in expected.values()) > 1000
    recorded = [record["loss"] for record in read_records(out / name / "metrics.jsonl")["step"]]
    assert recorded == pytest.approx(losses, abs=1e-5)
