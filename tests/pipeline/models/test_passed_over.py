"""Which modules a batch may pass over, and under which ZeRO stage they cannot be trained."""

import pytest
import torch
from torch import nn
from transformers import (
    BartForConditionalGeneration,
    MixtralForCausalLM,
    SwitchTransformersForConditionalGeneration,
)

from pipeline.models.passed_over import gather_experts_whole, passed_over_problems
from tests import tiny


def make(head, **changes):
    with torch.device("meta"):
        return tiny.model(head, **changes)


@pytest.fixture(scope="module")
def switch():
    return make(
        SwitchTransformersForConditionalGeneration,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )


class Block(nn.Module):
    """As models bring with their own code: a plain list of experts beside its router."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def gathered_whole(model):
    gather_experts_whole(model)
    return [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]


def test_experts_are_gathered_whole_where_they_are_chosen(switch):
    assert gathered_whole(switch) == [
        f"{stack}.block.1.layer.{place}.mlp.experts"
        for stack, place in (("encoder", 1), ("decoder", 2))
    ]
    assert gathered_whole(nn.ModuleDict({"layers": nn.Sequential(Block())})) == ["layers.0"]
    assert gathered_whole(make(MixtralForCausalLM, num_local_experts=2)) == []


@pytest.mark.parametrize(
    ("stage", "num_workers", "refused"),
    [(0, 2, False), (1, 2, True), (2, 2, True), (3, 2, False), (2, 1, False)],
)
def test_experts_of_their_own_need_stage_3_or_0(switch, stage, num_workers, refused):
    found = passed_over_problems(switch, stage, num_workers)
    assert bool(found) == refused
    if refused:
        assert str(found[0]).startswith("zero.stage: the experts of SwitchTransformersExperts are")


@pytest.mark.parametrize(
    ("stage", "num_workers", "refused"),
    [(0, 2, False), (1, 2, True), (2, 2, True), (3, 2, True), (3, 1, False)],
)
def test_layers_left_out_at_random_need_stage_0(stage, num_workers, refused):
    model = make(BartForConditionalGeneration, decoder_layerdrop=0.1)
    found = [str(problem) for problem in passed_over_problems(model, stage, num_workers)]
    assert bool(found) == refused
    if refused:
        assert found[0].startswith(f"model.overrides.decoder_layerdrop: ZeRO {stage} cannot train")
        assert len(found) == 1
