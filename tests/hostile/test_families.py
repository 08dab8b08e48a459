"""Models of many families against a task: right, or refused with one line."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from pipeline.errors import ConfigError
from pipeline.models.loading import load_model
from pipeline.models.source import ModelConfig
from pipeline.runs.fit import _of_kind, num_positions
from pipeline.runs.validate import validate
from pipeline.tasks import make_task
from pipeline.tasks.causal_lm import CausalLMConfig
from pipeline.tasks.text_to_text import TextToTextConfig
from pipeline.training.loop import uses_own_loss
from tests import tiny
from tests.hostile.folders import CLASSIFIER, changed, settings

pytestmark = pytest.mark.usefixtures("datasets_cache")
LM = "task={type: causal-lm, text: text, max_length: 8}"
TEXT = "task={type: text-to-text, source: text, target: text, max_length: 8, max_target_length: 8}"
MASKED = "task={type: masked-lm, text: text, max_length: 8}"


@pytest.fixture(scope="module")
def written_model(tmp_path_factory):
    """Write a tiny model of a family with a tokenizer of the data's words, once for all who ask."""
    root, folders = tmp_path_factory.mktemp("families"), {}

    def write(kind: str, head: str = "CausalLM", **changes: object) -> Path:
        asked = f"{kind}-{head}-{sorted(changes.items(), key=str)}"
        if asked not in folders:
            folder = folders[asked] = root / str(len(folders))
            torch.manual_seed(0)
            config = tiny.config(kind, **{"vocab_size": len(tiny.DAY_WORDS), **changes})
            auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
            auto.from_config(config).save_pretrained(folder)
            named = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "PAD", "CLS", "MASK")}
            tiny.word_tokenizer(
                tiny.DAY_WORDS, unknown="[UNK]", sep_token="[SEP]", eos_token="[SEP]", **named
            ).save_pretrained(folder)
        return folders[asked]

    return write


def lines(path: Path, *overrides: str) -> list[str]:
    try:
        validate(str(path), overrides, None)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("megatron-bert", {}), ("roformer", {}), ("big_bird", {}), ("xlnet", {"d_inner": 32})],
)
def test_a_model_that_looks_ahead_is_no_causal_one(good, written_model, kind, changes):
    (line,) = lines(good, f"model.path={written_model(kind, **changes)}", LM)
    assert "sees the tokens after the one it predicts" in line


def test_weights_that_texts_do_not_reach_are_not_pruned(good, written_model):
    folder = written_model("bart", pad_token_id=0, eos_token_id=3)
    (line,) = lines(good, f"model.path={folder}", LM)
    assert line.startswith(
        "prune.exclude: texts do not reach 8 of the 20 prunable weights, the first "
    )
    exclude = re.search(r"set prune.exclude: (\[.*\])", line)
    assert exclude is not None
    assert lines(good, f"model.path={folder}", LM, f"prune.exclude={exclude[1]}") == []
    bigbird = written_model("bigbird_pegasus", pad_token_id=0, eos_token_id=3)
    assert lines(good, f"model.path={bigbird}", LM, f"prune.exclude={exclude[1]}") == []
    config = make_task(CausalLMConfig(type="causal-lm"))
    assert not uses_own_loss(ModelConfig(path=str(folder)), config)


@pytest.mark.parametrize(
    ("kind", "changes", "limit"),
    [
        ("gptj", {"rotary_dim": 4}, 16),
        ("codegen", {"rotary_dim": 4, "num_attention_heads": 4}, 16),
        ("ctrl", {"dff": 32}, 16),
        ("gpt2", {}, 16),
        ("xglm", {}, None),
        ("bloom", {}, None),
    ],
)
def test_positions_that_are_no_weights_count_too(good, written_model, kind, changes, limit):
    folder = written_model(kind, max_position_embeddings=16, **changes)
    found = lines(good, f"model.path={folder}", LM, "task.max_length=40")
    said = f"task.max_length: the model has positions for {limit} tokens, got 40"
    assert [line for line in found if "positions" in line] == ([said] if limit else [])


def test_positions_of_a_tower_of_images_do_not_limit_texts():
    vision = {"image_size": 28, "patch_size": 14, "num_hidden_layers": 1}
    text = {"num_hidden_layers": 1, "hidden_size": 16, "max_position_embeddings": 64}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert num_positions(model) == 64


@pytest.mark.parametrize(("kind", "more"), [("bart", {}), ("t5", {"decoder_start_token_id": 0})])
def test_text_to_text_needs_the_tokenizer_s_padding_and_end(good, written_model, kind, more):
    folder = written_model(kind, "Seq2SeqLM", pad_token_id=5, eos_token_id=9, **more)
    pad, end = lines(good, f"model.path={folder}", TEXT)
    assert pad.startswith(
        "model.path: its tokenizer pads with token 0, the model takes 5 for padding"
    )
    assert end.startswith(
        "model.path: its tokenizer ends texts with token 3, the model takes 9 for"
    )
    remedies = [line.rpartition("set ")[2].replace(": ", "=") for line in (pad, end)]
    assert lines(good, f"model.path={folder}", TEXT, *remedies) == []


def test_text_to_text_without_padding_or_beginning(good, written_model):
    folder = written_model("t5", "Seq2SeqLM", pad_token_id=None, eos_token_id=3)
    pad, start = lines(good, f"model.path={folder}", TEXT)
    assert pad.endswith("set model.overrides.pad_token_id: 0")
    assert start.startswith(
        "model.path: its configuration does not say with which token the decoder"
    )
    assert start.endswith("name it: model.overrides.decoder_start_token_id")
    overrides = ("model.overrides.pad_token_id=0", "model.overrides.decoder_start_token_id=0")
    assert lines(good, f"model.path={folder}", TEXT, *overrides) == []


def test_text_to_text_needs_a_decoder_beside_an_encoder(good, written_model):
    config = transformers.VoxtralConfig()
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    task = make_task(TextToTextConfig(type="text-to-text", source="a", target="b")).config
    (problem,) = _of_kind(model, task)
    assert str(problem).startswith(
        "task.type: VoxtralForConditionalGeneration has no decoder beside"
    )


@pytest.mark.parametrize(
    ("kind", "is_asked"), [("mbart", False), ("bart", True), ("t5", True), ("umt5", True)]
)
def test_the_decoder_s_beginning_is_asked_where_it_is_used(good, written_model, kind, is_asked):
    folder = written_model(
        kind, "SequenceClassification", pad_token_id=0, eos_token_id=3, decoder_start_token_id=None
    )
    found = [x for x in lines(good, f"model.path={folder}") if "the decoder begins" in x]
    assert bool(found) == is_asked
    folder = written_model(
        kind, "Seq2SeqLM", pad_token_id=0, eos_token_id=3, decoder_start_token_id=None
    )
    assert [x for x in lines(good, f"model.path={folder}", TEXT) if "the decoder begins" in x]


# Leftover tensors: what is added to a good checkpoint, and whether it is one layer too many.
OLD_BUFFERS = {
    "gpt2": ({}, ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
    "gpt_neo": (
        {"attention_types": [[["global"], 2]]},
        ["transformer.h.0.attn.attention.masked_bias"],
    ),
    "gptj": ({"rotary_dim": 4}, ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
    "codegen": (
        {"rotary_dim": 4, "num_attention_heads": 4},
        ["transformer.h.0.attn.causal_mask"],
    ),
    "opt": ({}, ["decoder.version", "model.decoder.version"]),
    "llama": ({}, ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
}
TOO_MUCH = {
    "gpt2": ["transformer.h.2.attn.c_attn.weight"],
    "llama": ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"],
    "opt": ["model.decoder.layers.0.fc1.lora_A.weight"],
}


@pytest.mark.parametrize("kind", OLD_BUFFERS)
def test_buffers_of_old_versions_are_no_weights(good, written_model, tmp_path, kind):
    changes, names = OLD_BUFFERS[kind]
    folder = with_tensors(written_model(kind, **changes), tmp_path, names)
    assert lines(good, f"model.path={folder}", LM) == []
    notes = []
    load_model(
        ModelConfig(path=str(folder)),
        "AutoModelForCausalLM",
        model_kwargs={},
        dtype=torch.float32,
        seed=0,
        notify=notes.append,
    )
    assert all("newly" not in note for note in notes)


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in TOO_MUCH.items() for n in names])
def test_a_tensor_of_a_weight_that_the_model_does_not_have(
    good, written_model, tmp_path, kind, name
):
    folder = with_tensors(written_model(kind), tmp_path, [name])
    (line,) = lines(good, f"model.path={folder}", LM)
    assert line.startswith(f"model.path: '{folder}' holds the tensor {name} that the model has no")
    # An override of something else does not change that.
    more = "model.overrides.layerdrop=0.0" if kind == "opt" else "model.overrides.use_cache=false"
    assert name in str(lines(good, f"model.path={folder}", LM, more))


def test_a_decoder_of_the_pretraining_is_left_out_with_a_note(good, written_model):
    folder = written_model("funnel", "PreTraining", block_sizes=[1, 1], d_inner=32)
    assert not [x for x in lines(good, f"model.path={folder}") if x.startswith("model")]
    notes = []
    load_model(
        ModelConfig(path=str(folder)),
        CLASSIFIER,
        model_kwargs={"num_labels": 2, "id2label": {0: "a", 1: "b"}},
        dtype=torch.float32,
        seed=0,
        notify=notes.append,
    )
    assert notes[0].startswith(f"not used of {folder}: funnel.decoder.layers.0.")


def test_layers_left_over_are_refused_whatever_is_overridden(good, written_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(written_model("bert", "MaskedLM", num_hidden_layers=3), folder)
    settings(num_hidden_layers=2)(folder)
    for more in ((), ("model.overrides.layer_norm_eps=1e-6",)):
        (line,) = lines(good, f"model.path={folder}", *more)
        assert "holds 16 tensors, the first bert.encoder.layer.2." in line


@pytest.mark.parametrize(
    ("kind", "settings_of_it", "overrides"),
    [
        (
            "albert",
            {"num_hidden_groups": 2, "embedding_size": 8},
            ["model.overrides.num_hidden_groups=1"],
        ),
        ("bert", {}, ["model.overrides.num_hidden_layers=1"]),
        (
            "funnel",
            {"block_sizes": [1, 1, 1]},
            ["model.overrides.block_sizes=[1,1]", "model.overrides.block_repeats=[1,1]"],
        ),
    ],
)
def test_fewer_layers_may_be_asked(good, written_model, kind, settings_of_it, overrides):
    folder = written_model(kind, "MaskedLM", **settings_of_it)
    found = lines(good, f"model.path={folder}", *overrides)
    assert not [x for x in found if "no place" in x or "lacks" in x]


def test_fewer_layers_may_be_asked_of_what_lies_nested(good, tmp_path):
    text = {
        "num_hidden_layers": 4,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": len(tiny.DAY_WORDS),
        "pad_token_id": 0,
        "eos_token_id": 3,
        "bos_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.word_tokenizer(
        tiny.DAY_WORDS, unknown="[UNK]", unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    ).save_pretrained(tmp_path)
    fewer = "{num_hidden_layers: 2, layer_types: [sliding_attention, full_attention]}"
    asked = (f"model.path={tmp_path}", LM)
    assert lines(good, *asked) == []
    assert lines(good, *asked, f"model.overrides.text_config={fewer}") == []
    (line,) = lines(good, *asked, "model.overrides.num_hidden_layers=2")
    assert line == (
        "model.overrides.num_hidden_layers: gemma3 has no such setting; it has "
        "model.overrides.text_config.num_hidden_layers and "
        "model.overrides.vision_config.num_hidden_layers"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("hidden_act=bogus", "model.path: "),
        ("hidden_size=0", "model.path: "),
        ("num_attention_heads=3", "model.path: "),
        ("num_attention_heads=-1", "model.overrides.num_attention_heads: must not be negative"),
        ("intermediate_size=-32", "model.overrides.intermediate_size: must not be negative"),
        ("to_dict=5", "model.overrides.to_dict: bert has no such setting"),
        ("__class__=5", "model.overrides.__class__: bert has no such setting"),
        ("model_type=gpt2", "model.overrides.model_type: the checkpoint decides it; leave it out"),
        ("num_labels=5", "model.overrides.num_labels: the data's labels decide it; leave it out"),
        ("id2label={0: a}", "model.overrides.id2label: the data's labels decide it; leave it out"),
        ("dtype=banana", "model.overrides.dtype: zero.precision decides it; leave it out"),
    ],
)
def test_overrides_that_make_no_model(good, override, line):
    found = lines(good, f"model.overrides.{override}")
    assert found
    assert found[0].startswith(line)
    assert all("\n" not in x for x in found)


@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [("canine", "SequenceClassification", None), ("perceiver", "MaskedLM", MASKED)],
)
def test_models_without_an_embedding_of_tokens_have_no_traceback(
    good, written_model, kind, head, task
):
    changes = {}
    if kind == "perceiver":
        changes = {"d_latents": 16, "num_latents": 4, "num_self_attends_per_block": 1}
    folder = written_model(kind, head, **changes)
    for line in lines(good, f"model.path={folder}", *([task] if task else [])):
        assert "\n" not in line


def test_a_one_shot_method_needs_the_model_s_head(good, written_model, tmp_path):
    folder = written_model("llama", "", num_key_value_heads=2)
    values = yaml.safe_load(good.read_text(encoding="utf-8"))
    values["prune"] = {"method": {"name": "wanda"}, "sparsity": 0.5, "calibration_rows": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    asked = (f"model.path={folder}", LM)
    (line,) = lines(path, *asked)
    lacks = "lacks the weight lm_head.weight of the model; none may be new"
    assert line == f"model.path: '{folder}' {lacks}"
    assert lines(path, *asked, "prune.start_from=dense") == []


def test_a_head_of_other_labels_under_zero_3(good, written_model):
    folder = written_model("bert", "SequenceClassification", num_labels=5)
    assert lines(good, f"model.path={folder}", "zero.stage=2") == []
    (line,) = lines(good, f"model.path={folder}", "zero.stage=3")
    assert line == (
        f"model.path: the head of '{folder}' is for another number of labels than the data's 2; ZeRO 3 "
        "cannot leave it out: use zero.stage: 2"
    )


def test_a_pattern_where_nothing_says_which_way_matrices_lie(good, written_model):
    folder = written_model("xlnet", "SequenceClassification", d_inner=32, pad_token_id=0)
    asked = (f"model.path={folder}", "prune.include=['*.rel_attn.q']", "prune.pattern='2:4'")
    (line,) = lines(good, *asked)
    assert line.startswith(
        "prune.pattern: transformer.layer.0.rel_attn.q of shape (16, 2, 8) is no stack"
    )


def with_tensors(folder: Path, target: Path, names: list[str]) -> Path:
    target = target / "model"
    shutil.copytree(folder, target)
    changed(lambda t: {**t, **{name: torch.ones(2, 2) for name in names}})(target)
    return target
