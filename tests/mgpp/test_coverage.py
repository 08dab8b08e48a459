"""What of a model is prunable, against counts by hand."""

import pytest
import torch
from transformers import LlamaForCausalLM

from mgpp import coverage_of, select_prunable
from tests import tiny
from tests.mgpp import odd_holders

# Of a layer of `odd_holders`: attention, crossed attention with a key width of 4 and a value width of 6,
# the stack of experts, and the projections called gate_proj and output_gate.
PRUNABLE = 4 * 8 * 8 + (8 * 8 + 8 * 4 + 8 * 6 + 8 * 8) + 4 * 12 * 8 + 16 * 8 + 8 * 8
SCAN, PER_HEAD = 8 * 16, 8 * 2 * 4  # parameters of which no module says what they are
UNKNOWN = SCAN + PER_HEAD


@pytest.fixture(scope="module")
def odd():
    return odd_holders.make_model()


def test_the_layers_matrices_are_counted(odd):
    found = coverage_of(odd, select_prunable(odd))
    assert (found.num_prunable, found.num_covered) == (2 * PRUNABLE, 2 * PRUNABLE)
    assert found.num_in_layers == 2 * (PRUNABLE + UNKNOWN)
    assert found.num_parameters == sum(p.numel() for p in odd.parameters())
    assert found.left_out["layers.*.scan"] == 2 * SCAN
    assert found.left_out["layers.*.per_head"] == 2 * PER_HEAD
    assert found.share == PRUNABLE / (PRUNABLE + UNKNOWN) > 0.8


def test_a_selection_that_misses_much_is_warned_of_with_what_takes_all(odd):
    names = select_prunable(odd, exclude=["*.experts.*"])
    found = coverage_of(odd, names)  # as if the experts had not been noticed
    assert found.left_out["layers.*.experts.w_in"] == 2 * 4 * 12 * 8
    assert "layers.*.experts.w_in (768)" in found.warning
    assert str(list(found.include)) in found.warning
    unknown = {f"layers.{i}.{name}" for i in range(2) for name in ("scan", "per_head")}
    everything = {*select_prunable(odd), *unknown}
    assert set(select_prunable(odd, include=found.include)) == everything
    assert coverage_of(odd, everything).warning is None


def test_what_is_excluded_on_purpose_is_not_missed(odd):
    exclude = ["*.experts.*", "*.scan", "*.per_head"]
    found = coverage_of(odd, select_prunable(odd, exclude=exclude), exclude)
    assert found.share == 1
    assert found.warning is None
    assert found.include == ()
    assert found.left_out["layers.*.experts.w_in"] == 2 * 4 * 12 * 8


def test_embeddings_are_left_out_by_name_and_no_matter_of_the_layers():
    with torch.device("meta"):
        llama = tiny.model(LlamaForCausalLM, hidden_size=8)
    found = coverage_of(llama, select_prunable(llama))
    assert found.left_out == {"model.embed_tokens.weight": 32 * 8, "lm_head.weight": 32 * 8}
    assert found.share == 1
    assert found.warning is None
