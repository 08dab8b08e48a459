"""Weights without a gradient in a step: as with a gradient of zeros, on all ranks, and no rank waits.

What is compared with is plain torch in one process, which sees the batches of all ranks.
"""

from fnmatch import fnmatchcase
from functools import cache

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

import mgpp
from pipeline.tasks import make_task
from tests import tiny
from tests.cases import launch_cases
from tests.pipeline.training.passed_over_worker import (
    ACCUMULATION,
    ADAMW,
    CLIPPING,
    EXPERTS,
    LAYOUTS,
    NUM_STEPS,
    PRUNE,
    PRUNING,
    REFUSED,
    TASK,
    TRAIN,
    Layers,
    micro_batches,
)

pytestmark = pytest.mark.distributed


def write_experts(folder):
    """Write a Switch Transformer and rows of one word each, so that a row uses few experts."""
    tiny.model(
        SwitchTransformersForConditionalGeneration,
        vocab_size=len(tiny.SEQUENCE_WORDS),
        num_experts=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ).save_pretrained(folder / "model")
    for name in ("model", "data/tokenizer"):
        tiny.sequence_tokenizer().save_pretrained(folder / name)
    words = [4 + i % 5 for i in range(40)]
    columns = {
        "input_ids": [[word] * 6 for word in words],
        "attention_mask": [[1] * 6] * len(words),
        "labels": [[word] * 5 for word in reversed(words)],
    }
    rows = Dataset.from_dict(columns)
    DatasetDict(train=rows, validation=rows).save_to_disk(str(folder / "data" / "dataset"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passed-over")
    write_experts(folder)
    return launch_cases(
        "tests.pipeline.training.passed_over_worker",
        str(folder),
        cases=[*EXPERTS, REFUSED, *LAYOUTS],
        folder=folder,
        num_processes=2,
        timeout=300,
    )


@cache
def experts_reference(folder, frozen):
    """Train on whole batches; return the weights, and the experts that each rank uses in each step."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder / "model").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in frozen))
    rows = load_from_disk(str(folder / "data" / "dataset"))["train"]
    collate = make_task(TASK).collator(AutoTokenizer.from_pretrained(folder / "model"))
    plan = TRAIN.batch_plan(num_rows=len(rows), world_size=2)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=TRAIN.lr,
        betas=TRAIN.betas,
        eps=TRAIN.eps,
        weight_decay=0.0,
    )
    num_steps = TRAIN.num_steps(plan.steps_per_epoch)
    mgpp.attach((model, optimizer), PRUNE.settings, num_steps, len(rows))
    used, now = [], set()
    for name, module in model.named_modules():
        if "expert_" in name.rpartition(".")[2]:
            module.register_forward_hook(lambda *_, name=name: now.add(name))
    ranks = [plan.micro_batches(rank, 0) for rank in (0, 1)]
    for _ in range(num_steps):
        for _ in range(plan.accumulation):
            of_ranks = []
            for batches in ranks:
                now.clear()
                batch = collate([rows[i] for i in next(batches)])
                (model(**batch).loss / (2 * plan.accumulation)).backward()
                of_ranks.append(set(now))
            used.append(of_ranks)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, used


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_without_tokens_are_trained_as_in_one_process(trained, case):
    folder, frozen = trained.folder(case), EXPERTS[case][1]
    expected, used = experts_reference(folder, tuple(frozen))
    found = load_file(folder / case / "model" / "model.safetensors")
    before = load_file(folder / "model" / "model.safetensors")
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() < 1e-5, name
        assert torch.equal(found[name] == 0, weight == 0), name
        if any(fnmatchcase(name, pattern) for pattern in frozen):
            assert torch.equal(found[name], before[name])
    assert any(first != second for first, second in used)  # so that it is put to the test
    everything = {name for step in used for rank in step for name in rank}
    assert any(first | second != everything for first, second in used)


def test_a_stage_that_cannot_reduce_them_is_refused_before_the_first_step(trained):
    folder = trained.folder(REFUSED)
    for rank in (0, 1):
        said = (folder / f"{REFUSED}-rank{rank}.txt").read_text()
        assert said.startswith(
            "zero.stage: the experts of SwitchTransformersExperts are modules of"
        )
        assert "use zero.stage: 3, or 0" in said
    assert not (folder / REFUSED).exists()


@cache
def layers_reference():
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    pruner = mgpp.attach((model, optimizer), PRUNING, NUM_STEPS, 1000)
    for step in range(NUM_STEPS):
        for rank in (0, 1):
            for inputs, sometimes in micro_batches(step, rank):
                (model(inputs, sometimes) / (2 * ACCUMULATION)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        assert norm > CLIPPING
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, pruner.mask_hash()


@pytest.mark.parametrize("case", LAYOUTS)
def test_layers_that_are_not_used_are_trained_as_in_one_process(trained, case):
    folder, (expected, mask_hash) = trained.folder(case), layers_reference()
    for rank in (0, 1):
        found = torch.load(folder / f"{case}-rank{rank}.pt", weights_only=True)
        assert found["hash"] == mask_hash
        for name, weight in expected.items():
            assert (found["weights"][name] - weight).abs().max() < 1e-6, name
