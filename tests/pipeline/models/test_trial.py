"""What small copies of models show, against what is known of their architectures."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from pipeline.models.trial import behaviour_of, pattern_of, predicts_next_token, small_copy

CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"


def behaviour(kind, auto=CAUSAL, **changes):
    settings = AutoConfig.for_model(kind, **changes)
    return behaviour_of(settings, auto, max_length=32, trust_remote_code=False)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("megatron-bert", {}),
        ("rembert", {}),
        ("roformer", {}),
        ("big_bird", {}),
        ("xlnet", {}),
        ("xlm", {}),
        ("cpmant", {}),
        ("bert", {}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
    ],
)
def test_these_look_ahead(kind, changes):
    assert behaviour(kind, **changes).looks_ahead is True


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bigbird_pegasus", {}),
        ("bart", {}),
        ("gpt2", {}),
        ("llama", {}),
        ("gpt_oss", {}),
        ("qwen3_next", {}),
        ("mamba", {}),
        ("bert", {"is_decoder": True}),
        ("rembert", {"is_decoder": True}),
        ("gemma3_text", {}),
    ],
)
def test_these_do_not(kind, changes):
    assert behaviour(kind, **changes).looks_ahead is False


@pytest.mark.parametrize(
    ("kind", "auto", "ending"),
    [
        ("bart", CAUSAL, "encoder_attn.q_proj.weight"),
        ("trocr", CAUSAL, "encoder_attn.v_proj.weight"),
        ("prophetnet", CAUSAL, "cross_attn.key_proj.weight"),
        ("luke", MASKED, "self.e2w_query.weight"),
        ("longformer", MASKED, "self.key_global.weight"),
        ("gemma3", CAUSAL, "vision_tower.encoder.layers.*.mlp.fc1.weight"),
        ("granite_speech", "AutoModelForSeq2SeqLM", "intermediate_query.dense.weight"),
    ],
)
def test_what_texts_do_not_reach(kind, auto, ending):
    assert any(pattern.endswith(ending) for pattern in behaviour(kind, auto).unreached)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("bart", "AutoModelForSeq2SeqLM"),
        ("switch_transformers", "AutoModelForSeq2SeqLM"),
        ("mixtral", CAUSAL),
        ("falcon_mamba", CAUSAL),
        ("longformer", "AutoModelForSequenceClassification"),
        ("bart", "AutoModelForSequenceClassification"),
        ("deberta-v2", "AutoModelForQuestionAnswering"),
    ],
)
def test_all_matrices_that_texts_reach(kind, auto):
    changes = {"decoder_start_token_id": 0} if kind == "switch_transformers" else {}
    found = behaviour(kind, auto, **changes).unreached
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(AutoConfig.for_model(kind))
    matrices = {pattern_of(n) for n, p in model.named_parameters() if p.dim() > 1}
    assert matrices
    assert not {name for name in matrices & found if "embed" not in name}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bart", False),
        ("mbart", False),
        ("pegasus", False),
        ("blenderbot", False),
        ("mvp", False),
        ("plbart", False),
        ("trocr", False),
        ("prophetnet", False),
        ("bigbird_pegasus", False),
        ("gpt2", True),
        ("llama", True),
        ("opt", True),
        ("bert", True),
        ("falcon", True),
    ],
)
def test_whose_loss_is_that_of_the_next_token(kind, expected):
    settings = AutoConfig.for_model(kind)
    assert predicts_next_token(settings, CAUSAL, trust_remote_code=False) is expected


def test_a_router_s_loss_does_not_hide_it():
    settings = AutoConfig.for_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    assert predicts_next_token(settings, CAUSAL, trust_remote_code=False)


def test_a_copy_is_small_and_keeps_what_must_be_equal():
    settings = AutoConfig.for_model("deepseek_v3", num_hidden_layers=6, pad_token_id=128_000)
    copy = small_copy(settings, 2, 16)
    assert copy.num_hidden_layers == 2
    assert copy.n_routed_experts == 16
    assert copy.hidden_size * settings.kv_lora_rank == settings.hidden_size * copy.kv_lora_rank
    assert copy.qk_rope_head_dim == 4
    assert copy.pad_token_id < copy.vocab_size == 512
    assert settings.hidden_size == 7168


def test_the_generator_is_left_as_it_was_and_what_cannot_be_built_is_unknown():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    assert behaviour("opt").looks_ahead is False
    assert behaviour("gpt2", activation_function="bogus") is None
    assert torch.equal(torch.randn(2), expected)
