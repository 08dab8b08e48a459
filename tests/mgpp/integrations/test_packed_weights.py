"""`from_pretrained` of packed folders against the plain folders they were made of."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mgpp.integrations.transformers
from mgpp.sparse.checkpoint import pack_checkpoint
from mgpp.sparse.reading import PackedError, packed_weights
from tests import tiny
from tests.processes import ROOT

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
HEADS = [
    *((kind, "SequenceClassification") for kind in ("bert", "distilbert", "deberta-v2", "electra")),
    ("roberta", "QuestionAnswering"),
    ("bert", "TokenClassification"),
    ("bert", "MaskedLM"),
    ("t5", "Seq2SeqLM"),
    ("bart", "Seq2SeqLM"),
    *((kind, "CausalLM") for kind in (*tiny.DECODERS, "qwen3", "qwen3_moe", "deepseek_v3")),
]
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}
SPARSITIES = (0.95, 0.8, 0.0, 0.5, 0.99, 1.0)  # of one tensor after another


def settings(kind: str) -> transformers.PretrainedConfig:
    known = transformers.AutoConfig.for_model(kind).to_dict()
    changes = tiny.DECODERS.get(kind, {}) | EXPERTS
    changes = {n: v for n, v in changes.items() if n in known and n not in SIZES}
    return tiny.config(kind, **{**SIZES, **changes})


def auto(head: str):
    return getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")


def write(folder, kind="bert", head="SequenceClassification", **save):
    """Write a checkpoint with zeros: many, few or none, as tensors come in the files."""
    torch.manual_seed(0)
    auto(head).from_config(settings(kind)).save_pretrained(folder, **save)
    number = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in sorted(tensors.items()):
            if tensor.dim() > 1:
                sparsity = SPARSITIES[number % len(SPARSITIES)]
                tensor[torch.rand(tensor.shape) < sparsity] = 0
                number += 1
            tensors[name] = tensor
        save_file(tensors, file, {"format": "pt"})
    return folder


def packed_from(source, *, sharded=False):
    target = source.with_name(f"{source.name}-packed")
    found = pack_checkpoint(source, target)
    assert found.packed
    assert sharded == (len(list(target.glob("*.safetensors"))) > 1)
    return target


def bits(tensors):
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def assert_same(model, other):
    assert bits(model.state_dict()) == bits(other.state_dict())


@pytest.mark.parametrize(("kind", "head"), HEADS)
def test_a_packed_folder_loads_as_the_plain_one(tmp_path, kind, head):
    plain = write(tmp_path / "plain", kind, head)
    packed = packed_from(plain)
    want, info = auto(head).from_pretrained(plain, dtype="auto", output_loading_info=True)
    model, found = auto(head).from_pretrained(packed, dtype="auto", output_loading_info=True)
    assert_same(model, want)
    assert found == info
    assert not any(found[kind] for kind in ("missing_keys", "mismatched_keys", "error_msgs"))
    for each, folder in ((want, "want"), (model, "found")):
        each.save_pretrained(tmp_path / folder)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_transformers_merges_were_packed_one_by_one(tmp_path, kind):
    packed = packed_from(write(tmp_path / "plain", kind, "CausalLM"))
    entries = packed_weights(json.loads((packed / "config.json").read_text()))
    experts = [entry["encoding"] for name, entry in entries.items() if ".experts.1" in name]
    assert len(experts) >= 2


def test_stacked_experts_are_packed_whole(tmp_path):
    packed = packed_from(write(tmp_path / "plain", "gpt_oss", "CausalLM"))
    entries = packed_weights(json.loads((packed / "config.json").read_text()))
    assert any(len(entry["shape"]) == 3 for entry in entries.values())


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "device_map": {"": "cpu"}},
        {"dtype": "auto", "device_map": {"": "cpu"}},
        {"dtype": "auto", "disable_mmap": True},
        {},
    ],
)
@pytest.mark.parametrize(("kind", "head"), [("bert", "MaskedLM"), ("mixtral", "CausalLM")])
def test_options_of_loading_mean_what_they_mean_for_the_plain_one(tmp_path, kind, head, given):
    plain = write(tmp_path / "plain", kind, head)
    want = auto(head).from_pretrained(plain, **given)
    assert_same(auto(head).from_pretrained(packed_from(plain), **given), want)


@pytest.mark.parametrize(("kind", "head"), [("llama", "CausalLM"), ("mixtral", "CausalLM")])
def test_sharded_files(tmp_path, kind, head):
    plain = write(tmp_path / "plain", kind, head, max_shard_size="100KB")
    want = auto(head).from_pretrained(plain)
    assert_same(auto(head).from_pretrained(packed_from(plain, sharded=True)), want)


def test_weights_that_stay_on_disk_are_refused(tmp_path):
    packed = packed_from(write(tmp_path / "plain"))
    with pytest.raises(PackedError, match="mgpp unpack"):
        auto("SequenceClassification").from_pretrained(packed, device_map={"": "disk"})


def test_packed_weights_have_their_shapes_on_the_meta_device(tmp_path):
    """As who looks at shapes alone loads them."""
    plain = write(tmp_path / "plain")
    models = [
        auto("SequenceClassification").from_pretrained(folder, device_map="meta", dtype="auto")
        for folder in (plain, packed_from(plain))
    ]
    shapes = [{n: (t.shape, t.dtype, t.device) for n, t in m.state_dict().items()} for m in models]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("kind", "saved", "loaded"),
    [
        ("bert", "SequenceClassification", ""),
        ("bert", "", "SequenceClassification"),
        ("gpt2", "CausalLM", ""),
        ("gpt2", "", "CausalLM"),
        ("llama", "", "CausalLM"),
        ("mixtral", "CausalLM", ""),
    ],
)
def test_base_models_and_heads_load_from_each_other(tmp_path, kind, saved, loaded):
    plain = write(tmp_path / "plain", kind, saved)
    packed = packed_from(plain)
    models = []
    for folder in (plain, packed):
        torch.manual_seed(1)  # a head is drawn
        models.append(auto(loaded).from_pretrained(folder, output_loading_info=True))
    assert_same(models[1][0], models[0][0])
    assert models[1][1] == models[0][1]


def test_what_was_loaded_is_an_ordinary_model(tmp_path):
    packed = packed_from(write(tmp_path / "plain"))
    model = auto("SequenceClassification").from_pretrained(packed)
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    model.train()
    loss = model(input_ids=torch.arange(8).unsqueeze(0), labels=torch.tensor([1])).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.half().save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = auto("SequenceClassification").from_pretrained(tmp_path / "saved", dtype="auto")
    assert_same(again, model)


def test_registering_again_is_no_error(tmp_path):
    packed = packed_from(write(tmp_path / "plain"))
    importlib.reload(mgpp.integrations.packed_weights)
    importlib.reload(mgpp.integrations.transformers)
    auto("SequenceClassification").from_pretrained(packed)


LOAD = """
import sys
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "mgpp" for name in sys.modules)
"""


@pytest.mark.slow
def test_without_mgpp_it_fails_and_draws_nothing(tmp_path):
    plain = write(tmp_path / "plain")
    for folder, code in ((plain, 0), (packed_from(plain), 1)):
        ran = subprocess.run(
            [sys.executable, "-c", LOAD, folder],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            check=False,
        )
        assert ran.returncode == code, ran.stderr
    assert "mismatch" in ran.stderr


def change_entries(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["tensors"])
    path.write_text(json.dumps(config))


def drop_positions(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(n for n in sorted(tensors) if n.endswith(("_bitmask", "_gaps"))))
    save_file(tensors, file, {"format": "pt"})


def other_shape(entries):
    next(iter(entries.values()))["shape"] = [32, 32]


@pytest.mark.parametrize(
    ("harm", "kind", "why"),
    [
        (drop_positions, PackedError, "no file has "),
        (
            lambda folder: change_entries(folder, other_shape),
            PackedError,
            "is damaged, or of another model",
        ),
        (
            lambda folder: change_entries(
                folder, lambda entries: entries.update(x={"shape": [1], "encoding": "gaps"})
            ),
            PackedError,
            "no file has x, which config.json names",
        ),
        (
            lambda folder: change_entries(folder, lambda entries: entries.pop(min(entries))),
            RuntimeError,
            "mismatch",
        ),
        (
            lambda folder: change_entries(
                folder, lambda entries: entries.update(x={"shape": "4", "encoding": "gaps"})
            ),
            PackedError,
            "tensors is damaged",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, harm, kind, why):
    packed = packed_from(write(tmp_path / "plain"))
    harm(packed)
    with pytest.raises(kind, match=why):
        auto("SequenceClassification").from_pretrained(packed)


def test_loading_does_not_pack(tmp_path):
    plain = write(tmp_path / "plain")
    with pytest.raises(PackedError, match="mgpp pack"):
        auto("SequenceClassification").from_pretrained(
            plain, quantization_config=mgpp.integrations.packed_weights.PackedConfig(1, {})
        )
