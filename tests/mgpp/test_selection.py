import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mgpp import select_prunable


@pytest.fixture(scope="module")
def bert():
    with torch.device("meta"):
        return BertForSequenceClassification(
            BertConfig(
                num_hidden_layers=2, hidden_size=8, intermediate_size=12, num_attention_heads=2
            )
        )


def test_default_takes_the_matrices_of_the_encoder_layers(bert):
    names = select_prunable(bert)
    assert len(names) == 2 * 6
    assert all(n.startswith("bert.encoder.layer.") and n.endswith(".weight") for n in names)
    assert not any("LayerNorm" in n for n in names)


def test_default_takes_conv1d_of_gpt2_and_projections_of_llama():
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2))
        llama = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=2, hidden_size=8, intermediate_size=12, num_attention_heads=2
            )
        )
    assert len(select_prunable(gpt2)) == 2 * 4
    assert len(select_prunable(llama)) == 2 * 7


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
