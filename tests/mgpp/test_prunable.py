import pytest
import torch
from transformers import (
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from mgpp import select_prunable
from tests import tiny

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
