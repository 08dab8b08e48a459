"""The exported checkpoint: what was trained, with plain zeros, that loads everywhere."""

import json
import re
from importlib.metadata import version

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
)

import mgpp.integrations.transformers  # noqa: F401  # loads packed weights
from mgpp import select_prunable
from mgpp.sparse.zeros import by_pattern, count_zeros
from pipeline.errors import StageError
from pipeline.export.check import check_export
from pipeline.export.checkpoint import ExportConfig, export_model, read_weights
from pipeline.export.weights import ExportedWeights
from pipeline.models.weights import fingerprints
from pipeline.saving.checkpoint_files import TensorReader
from pipeline.storage.checksums import describe
from pipeline.storage.filesystems import open_storage
from pipeline.storage.outputs import OutputFiles
from tests import tiny
from tests.disk import no_large_files
from tests.pipeline.saving.models import joined_config

AUTO = "AutoModelForSequenceClassification"
LEFT_OUT = (  # large matrices outside of the layers
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.pooler.dense.weight",
)
PRUNING = {"method": {"name": "mgpp"}, "sparsity": 0.75, "num_pruned": 7680, "prune_start": 2}
CARD = {
    "name": "tiny-run",
    "model": "org/tiny",
    "method": "mgpp",
    "sparsity": 0.75,
    "num_pruned": 3072,
    "num_prunable": 4096,
    "metrics": {
        "dense": {"accuracy": "91.25%", "f1": "50.00%"},
        "pruned": {"accuracy": "87.65%", "f1": "25.00%"},
    },
    "num_rows": 12,
    "num_steps": 20,
    "prune_start": 2,
    "prune_end": 15,
    "config": "name: tiny-run\ntrain:\n  lr: 0.0001\n",
    "versions": {"torch": version("torch")},
}


def prune(model):
    """Set three of four prunable weights to zero, half of these to -0.0; return the names."""
    names = select_prunable(model)
    with torch.no_grad():
        for name in names:
            flat = model.get_parameter(name).view(-1)
            flat[0::4] = 0.0
            flat[1::4] = -0.0
            flat[2::4] = -0.0
    return names


@pytest.fixture(params=["float32", "bfloat16"])
def trained(request, tmp_path, tiny_bert):
    """A pruned classifier's folder, negative zeros in it, and the fingerprints of its weights."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=3, dtype=getattr(torch, request.param)
    )
    names = prune(model)
    folder = tmp_path / "trained"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder, fingerprints(model.named_parameters(), names)


def export(folder, weights, output, auto_model=AUTO, card=CARD, files=None, **settings):
    return export_model(
        trained=folder,
        weights=weights,
        auto_model=auto_model,
        pruning=PRUNING,
        card=card,
        config=ExportConfig(**settings),
        trust_remote_code=False,
        output=output,
        files=files or OutputFiles(str(output)),
    )


def check(folder, weights):
    tensors = TensorReader(str(folder))
    auto = AutoModelForSequenceClassification
    return check_export(folder, tensors, weights, auto, trust_remote_code=False)


def tensors_of(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def has_negative_zeros(tensors):
    return any(bool(torch.signbit(t[t == 0]).any()) for t in tensors.values())


def test_the_export_holds_what_was_trained_with_plain_zeros(trained, tmp_path):
    folder, weights = trained
    found = export(folder, weights, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out" / "model")
    assert has_negative_zeros(before)
    assert not has_negative_zeros(after)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    prunable = [after[name] for name, entry in weights.items() if "zeros" in entry]
    assert len(prunable) == 2 * 6  # six matrices in each of two layers
    num_zeros = sum(int((t == 0).sum()) for t in prunable)
    num_prunable = sum(t.numel() for t in prunable)
    num_parameters = sum(t.numel() for t in after.values())
    model_zeros = sum(int((t == 0).sum()) for t in after.values())
    assert found == {
        "num_zeros": num_zeros,
        "num_prunable": num_prunable,
        "sparsity": num_zeros / num_prunable,
        "num_parameters": num_parameters,
        "model_zeros": model_zeros,
        "model_sparsity": model_zeros / num_parameters,
        "left_out": {name: after[name].numel() for name in LEFT_OUT},
        "warnings": [],
        "dtype": weights["bert.pooler.dense.weight"]["dtype"],
        "cast_from": None,
        "bytes": (tmp_path / "out" / "model" / "model.safetensors").stat().st_size,
        "num_files": 1,
        "embedding_bytes": sum(
            t.nbytes for name, t in after.items() if "embeddings" in name and t.dim() == 2
        ),
    }
    assert found["sparsity"] == 0.75


def test_the_exported_folder_is_a_checkpoint_like_any_other(trained, tmp_path, tiny_bert):
    folder, weights = trained
    export(folder, weights, tmp_path / "out")
    exported = tmp_path / "out" / "model"
    config = json.loads((exported / "config.json").read_text())
    zeros = config["pruning_config"].pop("zeros")
    assert config["pruning_config"] == PRUNING
    found = by_pattern(count_zeros(exported))
    assert zeros == {name: found[name].zeros for name in found if ".layer." in name}
    assert config["architectures"] == ["BertForSequenceClassification"]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer(["a good day", "bad"], padding=True, return_tensors="pt")
    assert (
        inputs["input_ids"][0].tolist()
        == (AutoTokenizer.from_pretrained(tiny_bert)("a good day")["input_ids"])
    )
    logits = [
        AutoModelForSequenceClassification.from_pretrained(path).eval()(**inputs).logits
        for path in (folder, exported)
    ]
    assert torch.equal(*logits)


def test_the_model_card_holds_the_figures(trained, tmp_path):
    folder, weights = trained
    export(folder, weights, tmp_path / "out")
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "org/tiny",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["pruned", "sparse", "mgpp"],
    }
    assert body.lstrip().startswith("# tiny-run\n")
    for text in (
        "`org/tiny`",
        "**75.00%**",
        "MGPP: 3,072 of 4,096 prunable weights",
        "Measured on 12 validation rows.",
        "20 optimizer steps; first pruning at step 2, last at step 15",
        "```yaml\nname: tiny-run\ntrain:\n  lr: 0.0001\n```",
        f"- torch {version('torch')}\n",
    ):
        assert text in body
    table = re.search(r"^\| metric .*(?:\n\|.*)+", body, re.MULTILINE).group()
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.split("\n")
    ]
    assert rows == [
        ["metric", "dense", "pruned"],
        ["---", "---", "---"],
        ["accuracy", "91.25%", "87.65%"],
        ["f1", "50.00%", "25.00%"],
    ]


def test_the_model_card_of_a_run_without_a_baseline(trained, tmp_path):
    folder, weights = trained
    card = {**CARD, "metrics": {"pruned": {"accuracy": "87.50%"}}}
    export(folder, weights, tmp_path / "out", card=card)
    text = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert re.search(
        r"^\| metric \| pruned \| *\n\|---\|---\| *\n\| accuracy \| 87\.50% \| *$", text, re.M
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_are_cast_and_zeros_counted_after_it(trained, tmp_path, dtype):
    folder, weights = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
    weight = model.bert.encoder.layer[0].output.dense.weight
    trained_zeros = sum(entry.get("zeros", 0) for entry in weights.values())
    tiny_value = 1e-9  # in float16 it is zero
    with torch.no_grad():
        weight.view(-1)[3] = tiny_value
    model.save_pretrained(folder)
    weights = fingerprints(model.named_parameters(), select_prunable(model))
    found = export(folder, weights, tmp_path / "out", dtype=dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    before, after = tensors_of(folder), tensors_of(tmp_path / "out" / "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == kind
        assert torch.equal(after[name], tensor.to(kind)), name
    assert not has_negative_zeros(after)
    assert found["num_zeros"] == trained_zeros + (dtype == "fp16")
    assert found["dtype"] == str(kind).removeprefix("torch.")
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["dtype"] == found["dtype"]
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    was = str(model.dtype).removeprefix("torch.")
    said = (
        f"trained in {was} and written in {found['dtype']}; in the files\n{found['num_zeros']:,} "
    )
    assert (said in card) == (was != found["dtype"])
    assert found["cast_from"] == (None if was == found["dtype"] else was)


def test_what_is_cast_is_compared_before_with_what_was_trained(trained, tmp_path):
    folder, weights = trained
    weights["bert.pooler.dense.weight"]["sha256"] = "0" * 64
    with pytest.raises(StageError, match=r"trained differ from what was trained.*pooler"):
        export(folder, weights, tmp_path / "out", dtype="fp16")


def test_values_beyond_a_dtype_are_refused(tmp_path, trained):
    folder, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = 1e6
    model.save_pretrained(folder)
    weights = fingerprints(model.named_parameters(), select_prunable(model))
    with pytest.raises(StageError, match=r"pooler\.dense\.weight that are not finite"):
        export(folder, weights, tmp_path / "out", dtype="fp16")


def test_a_packed_copy_holds_the_same_model(tmp_path):
    model, weights = gpt2(tmp_path)
    formats = {"format": ("plain", "packed"), "max_shard_size": "100KB"}
    found = export(
        tmp_path / "trained", weights, tmp_path / "out", "AutoModelForCausalLM", **formats
    )
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        for name in ("model", "packed")
    ]
    want, loaded = (dict(model.named_parameters()) for model in models)
    assert want.keys() == loaded.keys()
    assert all(torch.equal(want[name], loaded[name]) for name in want)
    files = {
        name: sum(path.stat().st_size for path in (tmp_path / "out" / name).glob("*.safetensors"))
        for name in ("model", "packed")
    }
    assert found["bytes"] == files["model"]
    assert found["packed_bytes"] == files["packed"] < 0.6 * files["model"]
    embeddings = model.transformer.wte.weight.nbytes + model.transformer.wpe.weight.nbytes
    assert found["embedding_bytes"] == found["packed_embedding_bytes"] == embeddings
    assert found["warnings"] == []


def gpt2(tmp_path):
    """A pruned decoder's folder, larger than what a disk takes below, and its fingerprints."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = tiny.model(GPT2LMHeadModel, num_hidden_layers=2, **sizes)
    names = prune(model)
    model.save_pretrained(tmp_path / "trained")
    tiny.decoder_tokenizer().save_pretrained(tmp_path / "trained")
    return model, fingerprints(model.named_parameters(), names)


def by_name(filesystem, root):
    return {path[len(root) + 1 :]: filesystem.cat_file(path) for path in filesystem.find(root)}


@pytest.mark.parametrize("changes", [{}, {"dtype": "bf16", "max_shard_size": "100KB"}])
def test_weights_go_straight_to_an_object_store(tmp_path, bucket, changes):
    _, weights = gpt2(tmp_path)
    given = {"auto_model": "AutoModelForCausalLM", "format": ("plain", "packed"), **changes}
    local = export(tmp_path / "trained", weights, tmp_path / "local", **given)
    files = OutputFiles(f"{bucket}/{tmp_path.name}")
    with no_large_files(20_000):
        streamed = export(tmp_path / "trained", weights, tmp_path / "out", files=files, **given)
    assert streamed == local
    stored, beside, whole = (
        by_name(*open_storage(url))
        for url in (files.url, str(tmp_path / "out"), str(tmp_path / "local"))
    )
    assert not stored.keys() & beside.keys()
    assert stored | beside == whole
    assert set(stored) == {name for name in whole if name.endswith(".safetensors")}
    assert sum(map(len, stored.values())) == local["bytes"] + local["packed_bytes"] > 100_000
    assert files.written == {name: describe(tmp_path / "local" / name) for name in stored}


def test_a_model_that_is_compared_whole_is_written_here_first(tmp_path, bucket):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(joined_config())
    names = prune(model)
    model.save_pretrained(tmp_path / "trained")
    tiny.decoder_tokenizer().save_pretrained(tmp_path / "trained")
    weights = fingerprints(model.named_parameters(), names)
    files = OutputFiles(f"{bucket}/{tmp_path.name}")
    export(tmp_path / "trained", weights, tmp_path / "out", "AutoModelForMaskedLM", files=files)
    assert not files.written
    assert tensors_of(tmp_path / "out" / "model").keys() == tensors_of(tmp_path / "trained").keys()


def test_what_storage_holds_is_compared_with_what_was_trained(tmp_path, bucket, monkeypatch):
    """Let storage change a byte of what it takes."""
    _, weights = gpt2(tmp_path)
    url = f"{bucket}/{tmp_path.name}"
    write = ExportedWeights.write

    def write_badly(self, files, folder):
        write(self, files, folder)
        filesystem, root = open_storage(url)
        path = f"{root}/model/model.safetensors"
        content = bytearray(filesystem.cat_file(path))
        content[-1] ^= 1
        filesystem.pipe_file(path, bytes(content))

    monkeypatch.setattr(ExportedWeights, "write", write_badly)
    with pytest.raises(StageError, match=r"1 of \d+ parameters of s3://.* differ from what was"):
        export(
            tmp_path / "trained",
            weights,
            tmp_path / "out",
            "AutoModelForCausalLM",
            files=OutputFiles(url),
        )


def test_a_packed_copy_that_would_not_be_smaller_is_a_warning(trained, tmp_path):
    folder, weights = trained  # its matrices are below the size that is packed
    found = export(folder, weights, tmp_path / "out", format=("plain", "packed"))
    assert [w for w in found["warnings"] if w.startswith("no packed copy is written: ")]
    assert not (tmp_path / "out" / "packed").exists()
    assert "packed_bytes" not in found


@pytest.mark.parametrize("given", [(), ("packed",), ("onnx",), ("plain", "plain"), ("zip",)])
def test_the_plain_copy_is_always_written(given):
    with pytest.raises(ValueError, match=r"allowed are|Input should be"):
        ExportConfig(format=given)


def test_a_large_model_is_cut_into_several_files(trained, tmp_path):
    folder, weights = trained
    found = export(folder, weights, tmp_path / "out", max_shard_size="4KB")
    exported = tmp_path / "out" / "model"
    files = sorted(exported.glob("*.safetensors"))
    assert found["num_files"] == len(files) > 2
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    for path in files:
        with safe_open(path, "pt") as file:
            assert {n for n, place in index["weight_map"].items() if place == path.name} == set(
                file.keys()
            )
    after = tensors_of(exported)
    assert not has_negative_zeros(after)
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(after[name], tensor)
    assert found["sparsity"] == 0.75


def test_tied_weights_are_exported_once(tmp_path, tiny_bert):
    model = tiny.model(
        GPT2LMHeadModel,
        seed=1,
        vocab_size=26,
        max_position_embeddings=8,
        hidden_size=8,
        num_hidden_layers=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    names = prune(model)
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "trained")
    weights = fingerprints(model.named_parameters(), names)
    found = export(tmp_path / "trained", weights, tmp_path / "out", "AutoModelForCausalLM")
    assert found["num_parameters"] == sum(p.numel() for p in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


# What is not what was trained.


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "0" * 64},
        {"zeros": 1},
        {"dtype": "float64"},
        {"shape": [1]},
    ],
)
def test_another_fingerprint_than_the_trained_one_is_refused(trained, tmp_path, change):
    folder, weights = trained
    name = next(name for name, entry in weights.items() if "zeros" in entry)
    tampered = {**weights, name: {**weights[name], **change}}
    with pytest.raises(StageError, match=f"1 of {len(weights)} parameters .*{name}") as raised:
        export(folder, tampered, tmp_path / "out")
    assert "differ from what was trained" in str(raised.value)


@pytest.mark.parametrize("more", [True, False])
def test_other_parameters_than_the_trained_ones_are_refused(trained, tmp_path, more):
    folder, weights = trained
    changed = dict(weights)
    if more:
        changed["bert.nowhere.weight"] = weights["classifier.bias"]
    else:
        del changed["classifier.bias"]
    with pytest.raises(StageError, match="differ from what was trained"):
        export(folder, changed, tmp_path / "out")


def test_a_changed_file_is_refused(trained, tmp_path):
    folder, weights = trained
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.weight"].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"first classifier\.weight"):
        export(folder, weights, tmp_path / "out")


def test_negative_zeros_in_a_checkpoint_are_refused(trained):
    folder, weights = trained  # it has them, and fingerprints do not tell
    with pytest.raises(StageError, match="holds negative zeros"):
        check(folder, weights)


def test_weights_that_would_be_drawn_anew_are_refused(trained):
    folder, weights = trained
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["classifier.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"does not load cleanly: .*classifier\.weight"):
        check(folder, weights)


def test_fingerprints_are_read_as_they_were_written(trained, tmp_path):
    _, weights = trained
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    assert read_weights(tmp_path, "weights.json") == weights
