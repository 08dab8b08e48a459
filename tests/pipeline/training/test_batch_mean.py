"""Weighted micro-batches against the whole batch in float64, by the gradients of a model."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import BartForCausalLM, LlamaForCausalLM, MixtralForCausalLM

from pipeline.tasks import make_task
from pipeline.tasks.base import without_labels
from pipeline.tasks.instruction import InstructionConfig
from pipeline.training.batch_mean import (
    WHOLE,
    num_attended,
    weigh,
    weighted_loss,
    with_a_target,
)
from pipeline.worker_group import WorkerGroup
from tests import tiny

TASK = make_task(InstructionConfig(type="instruction", prompt="prompt", response="answer"))
NUM_LABELS = (1, 3, 9, 0)  # of the rows; of the last one no token is to be predicted
LENGTH = 12


def make_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 30, (len(NUM_LABELS), LENGTH), generator=generator)
    labels = torch.full_like(ids, -100)
    for row, count in enumerate(NUM_LABELS):
        labels[row, LENGTH - count :] = ids[row, LENGTH - count :]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def micro_batches(batch, size):
    cuts = {name: values.split(size) for name, values in batch.items()}
    return [dict(zip(cuts, parts, strict=True)) for parts in zip(*cuts.values(), strict=True)]


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("head", [LlamaForCausalLM, BartForCausalLM])
def test_the_gradient_is_that_of_the_mean_over_all_targets(head, size):
    """Also of a decoder like BART's, whose own loss is not that of the next token."""
    own_loss = head is LlamaForCausalLM
    model = tiny.model(head, **({"num_key_value_heads": 2} if own_loss else {})).double().eval()
    batch = make_batch()
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    chosen = targets >= 0
    total = functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
    expected = gradient_of(model, total / sum(NUM_LABELS))
    cuts = micro_batches(batch, size)
    weights, _ = weigh(TASK, cuts, WorkerGroup.alone())
    losses = []
    for cut, weight in zip(cuts, weights, strict=True):
        given = with_a_target(TASK, cut)
        outputs = model(**(given if own_loss else without_labels(given)))
        losses.append(weighted_loss(outputs, given, TASK, weight.targets.double()))
    mean = torch.stack(losses).mean()
    assert torch.allclose(gradient_of(model, mean), expected, atol=1e-7)
    assert [float(weight.tokens) for weight in weights] == [1.0] * len(cuts)
    assert num_attended(batch) == batch["input_ids"].numel()


def test_what_a_router_adds_counts_once():
    model = tiny.model(
        MixtralForCausalLM,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    (batch,) = micro_batches(make_batch(), len(NUM_LABELS))
    outputs = model(**batch)
    of_router = 0.5 * outputs.aux_loss
    assert of_router > 0.1
    weight = torch.tensor(3.0)
    found = weighted_loss(outputs, batch, TASK, weight)
    assert found.item() == pytest.approx(
        (3 * (outputs.loss - of_router) + of_router).item(), rel=1e-6
    )
    assert weighted_loss(outputs, batch, TASK, WHOLE.targets).item() == pytest.approx(
        outputs.loss.item(), rel=1e-6
    )


def test_rows_without_any_target_leave_the_weights_alone():
    model = tiny.model(LlamaForCausalLM, num_key_value_heads=2)
    batch = micro_batches(make_batch(), 1)[-1]
    assert TASK.num_targets(batch) == 0
    assert not model(**batch).loss.isfinite()  # what the weight alone would not mend
    given = with_a_target(TASK, batch)
    (weights,), _ = weigh(TASK, [batch], WorkerGroup.alone())
    loss = weighted_loss(model(**given), given, TASK, weights.targets)
    assert not gradient_of(model, loss).any()


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_the_weights_of_ranks_rest_on_the_sum_over_them_and_any_flag_is_all_s(flags):
    """As the second of two ranks, of which the first holds 9 of 12 targets."""

    class Other(WorkerGroup):
        def start_total(self, values):
            return lambda: values + torch.tensor([9.0, 36.0, float(flags[0])])

    second = Other(**vars(replace(WorkerGroup.alone(), world_size=2)))
    cut = {name: values[1:2] for name, values in make_batch().items()}
    (weights,), any_flag = weigh(TASK, [cut], second, flag=flags[1])
    assert any_flag() == any(flags)
    assert (float(weights.targets), float(weights.tokens)) == (3 * 2 / 12, 12 * 2 / 48)
