import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from mgpp import select_prunable, transposed_weights
from tests import tiny
from tests.mgpp import odd_holders

SIZES = {"hidden_size": 8, "intermediate_size": 12}


@pytest.fixture(scope="module")
def bert():
    with torch.device("meta"):
        return tiny.model(BertForSequenceClassification, **SIZES)


def test_default_takes_the_matrices_of_the_encoder_layers(bert):
    names = select_prunable(bert)
    assert len(names) == 2 * 6
    assert all(n.startswith("bert.encoder.layer.") and n.endswith(".weight") for n in names)
    assert not any("LayerNorm" in n for n in names)


def test_default_takes_conv1d_of_gpt2_and_projections_of_llama():
    with torch.device("meta"):
        gpt2 = tiny.model(GPT2LMHeadModel, hidden_size=8)
        llama = tiny.model(LlamaForCausalLM, **SIZES)
    assert len(select_prunable(gpt2)) == 2 * 4
    assert len(select_prunable(llama)) == 2 * 7


def projections(layers, blocks, names):
    """The weights of a stack's layers, written out."""
    return {f"{layers}.{i}.{name}.weight" for i in range(blocks) for name in names}


def test_default_takes_encoder_and_decoder_of_bart():
    with torch.device("meta"):
        bart = tiny.model(BartForConditionalGeneration, **SIZES, decoder_layers=3)
    heads = ["q_proj", "k_proj", "v_proj", "out_proj"]
    encoder = [f"self_attn.{head}" for head in heads] + ["fc1", "fc2"]
    decoder = encoder + [f"encoder_attn.{head}" for head in heads]
    expected = projections("model.encoder.layers", 2, encoder)
    assert set(select_prunable(bart)) == expected | projections("model.decoder.layers", 3, decoder)


@pytest.mark.parametrize(
    ("activation", "inner"), [("relu", ["wi", "wo"]), ("gated-gelu", ["wi_0", "wi_1", "wo"])]
)
def test_default_takes_encoder_and_decoder_of_t5(activation, inner):
    # Not the relative position biases, which are embeddings of the first layers.
    with torch.device("meta"):
        t5 = tiny.model(
            T5ForConditionalGeneration,
            **SIZES,
            num_decoder_layers=3,
            feed_forward_proj=activation,
        )
    attention = [f"layer.0.SelfAttention.{head}" for head in "qkvo"]
    crossed = [f"layer.1.EncDecAttention.{head}" for head in "qkvo"]
    encoder = attention + [f"layer.1.DenseReluDense.{name}" for name in inner]
    decoder = attention + crossed + [f"layer.2.DenseReluDense.{name}" for name in inner]
    expected = projections("encoder.block", 2, encoder)
    assert set(select_prunable(t5)) == expected | projections("decoder.block", 3, decoder)


def test_patterns(bert):
    names = select_prunable(bert, include=["*.attention.*.weight"], exclude=["*LayerNorm*"])
    assert len(names) == 2 * 4
    without = select_prunable(bert, exclude=["*.layer.0.*"])
    assert len(without) == 6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": ["encoder.*"]}, "matches no parameter"),
        ({"exclude": ["nothing*"]}, "exclude pattern"),
        ({"include": ["*LayerNorm*"]}, "only matrices"),
        ({"exclude": ["*"]}, "no weight is left"),
    ],
)
def test_bad_patterns_are_refused(bert, kwargs, message):
    with pytest.raises(ValueError, match=message):
        select_prunable(bert, **kwargs)


def test_default_takes_matrices_however_they_are_held():
    per_layer = [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "crossed.q_proj_weight",
        "crossed.k_proj_weight",
        "crossed.v_proj_weight",
        "crossed.out_proj.weight",
        "experts.w_in",
        "gate_proj.weight",
    ]
    expected = {f"layers.{i}.{name}" for i in range(2) for name in per_layer}
    assert set(select_prunable(odd_holders.make_model())) == expected


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = [f"{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("kind", "settings", "linear", "stacked", "inputs_first"),
    [
        ("mixtral", {}, ATTENTION, EXPERTS, False),
        ("gpt_oss", {}, ATTENTION, EXPERTS, True),
        (
            "qwen2_moe",
            {"shared_expert_intermediate_size": 12},
            [*ATTENTION, *(f"mlp.shared_expert.{name}" for name in SHARED)],
            EXPERTS,
            False,
        ),
        (
            "llama4_text",
            {"interleave_moe_layer_step": 1},
            [*ATTENTION, *(f"feed_forward.shared_expert.{name}" for name in SHARED)],
            [name.replace("mlp", "feed_forward") for name in EXPERTS],
            True,
        ),
    ],
)
def test_default_takes_experts_and_no_router(kind, settings, linear, stacked, inputs_first):
    config = tiny.config(kind, **SIZES, **settings)
    for name in ("num_local_experts", "num_experts"):
        if hasattr(config, name):
            setattr(config, name, 4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stacks = {f"model.layers.{i}.{name}" for i in range(2) for name in stacked}
    assert set(select_prunable(model)) == projections("model.layers", 2, linear) | stacks
    assert transposed_weights(model) == (stacks if inputs_first else set())
