import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from mgpp import PruningConfig, coverage_of, select_prunable, transposed_weights
from mgpp.prunable import full_shapes, layer_matrices
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
    """And no router, gate of few outputs, head, or parameter of which nothing says what it is."""
    per_layer = [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "crossed.q_proj_weight",
        "crossed.k_proj_weight",
        "crossed.v_proj_weight",
        "crossed.out_proj.weight",
        "experts.w_in",
        "gate_proj.weight",
        "output_gate.weight",
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


def of_default_sizes(kind, auto=AutoModelForCausalLM, **changes):
    """A model of an architecture on the meta device, as large as its default configuration."""
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(kind, **changes))


@pytest.mark.parametrize(
    ("kind", "settings", "taken", "left"),
    [
        ("xlstm", {}, ["ffn.proj_up_gate.weight"], []),
        ("minimax", {}, ["self_attn.output_gate.weight"], ["mlp.gate.weight"]),
        ("gemma3n_text", {}, ["per_layer_input_gate.weight"], ["altup.modality_router.weight"]),
        ("kimi_linear", {}, ["self_attn.forget_gate.f_b_proj.weight"], ["mlp.gate.weight"]),
        ("bailing_hybrid", {}, ["self_attn.forget_gate.f_proj.weight"], ["mlp.gate.weight"]),
        ("qwen3_next", {}, [], ["mlp.gate.weight", "mlp.shared_expert_gate.weight"]),
        ("zaya", {}, [], ["mlp.gate.down_proj.weight", "mlp.gate.router_mlp.fc1.weight"]),
        ("hunyuan_v1_moe", {"num_experts": 4, "head_dim": 8}, [], ["mlp.gate.wg.weight"]),
        ("jetmoe", {}, ["mlp.input_linear.weight"], ["mlp.router.layer.weight"]),
        ("longcat_flash", {}, ["mlp.experts.down_proj"], ["mlp.router.classifier.weight"]),
    ],
)
def test_a_gate_is_what_chooses_among_a_few(kind, settings, taken, left):
    model = of_default_sizes(kind, **settings)
    names = set(select_prunable(model))
    endings = {name.split(".", 3)[-1] for name in names}
    assert set(taken) <= endings
    held = {name.split(".", 3)[-1] for name, _ in model.named_parameters()}
    assert set(left) <= held - endings


@pytest.mark.parametrize(
    ("kind", "auto", "settings", "unknown"),
    [
        ("xlnet", AutoModelForCausalLM, {}, ["rel_attn.q", "rel_attn.o"]),
        ("funnel", AutoModelForMaskedLM, {}, ["attention.r_kernel"]),
        ("recurrent_gemma", AutoModelForCausalLM, {}, ["rg_lru.input_gate_weight"]),
        (
            "convbert",
            AutoModelForMaskedLM,
            {"num_groups": 2},
            ["intermediate.dense.weight", "output.dense.weight"],
        ),
    ],
)
def test_parameters_of_three_dimensions_that_are_no_experts_are_left_to_include(
    kind, auto, settings, unknown
):
    model = of_default_sizes(kind, auto, **settings)
    names, shapes = select_prunable(model), full_shapes(model)
    assert all(len(shapes[name]) == 2 for name in names)
    for ending in unknown:
        assert any(
            name.endswith(ending) and len(shapes[name]) == 3 for name in layer_matrices(model)
        )
    wanted = coverage_of(model, names).include
    for ending in unknown:
        assert any(pattern.endswith(ending) for pattern in wanted)
    # Included, they are pruned weight by weight: nothing says which way they lie, or what a matrix is.
    included = {"include": wanted, "sparsity": 0.5}
    assert len(PruningConfig(**included).select(model)) > len(names)
    with pytest.raises(ValueError, match=r"^pattern: .* is no stack of experts"):
        PruningConfig(**included, pattern="2:4").select(model)
    with pytest.raises(ValueError, match=r"^scope: .* is no stack of experts"):
        PruningConfig(**included, scope="uniform").select(model)


def test_experts_whose_orientation_is_unknown_have_no_pattern():
    model = odd_holders.make_model()
    with pytest.raises(ValueError, match=r"^pattern: nothing says .*layers\.0\.experts\.w_in"):
        PruningConfig(sparsity=0.5, pattern="2:4").select(model)
    without = PruningConfig(sparsity=0.5, pattern="2:4", exclude=["*.experts.*"])
    assert len(without.select(model)) == 2 * 8


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("gemma3", AutoModelForCausalLM),
        ("got_ocr2", AutoModelForCausalLM),
        ("qwen3_5", AutoModelForSequenceClassification),
        ("voxtral", AutoModelForSeq2SeqLM),
        ("modernvbert", AutoModelForMaskedLM),
        ("t5gemma2", AutoModelForSeq2SeqLM),
        ("whisper", AutoModelForCausalLM),
    ],
)
def test_default_takes_no_tower_of_images_or_sounds(kind, auto):
    model = of_default_sizes(kind, auto)
    names = select_prunable(model)
    assert not [n for n in names if "vis" in n or "audio" in n]
    found = coverage_of(model, names)
    assert found.share > 0.99
    towers = [n for n in found.left_out if "vis" in n or "audio" in n]
    assert bool(towers) == (kind not in ("whisper", "t5gemma2")), found.left_out
    for pattern in towers:
        assert select_prunable(model, include=[pattern])


def test_without_a_matrix_that_it_knows_it_names_the_patterns():
    model = of_default_sizes("ibert", AutoModelForMaskedLM)
    with pytest.raises(ValueError, match="no weight is left") as caught:
        select_prunable(model)
    patterns = re.search(r"set include: \[(.*)\]", str(caught.value))
    assert patterns is not None
    names = select_prunable(model, include=re.findall(r"'([^']+)'", patterns[1]))
    assert len(names) == 12 * 6
