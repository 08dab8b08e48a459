"""Packed folders against the folders, file by file."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

from mgpp.sparse.checkpoint import pack_checkpoint, unpack_checkpoint
from mgpp.sparse.packing import unpack
from mgpp.sparse.reading import PackedError, packed_weights, read_tensor, tensor_bytes
from tests import tiny

HEADS = {
    "bert": (BertForSequenceClassification, {}),
    "gpt2": (GPT2LMHeadModel, {}),
    "llama": (LlamaForCausalLM, {"num_key_value_heads": 2}),
}


def write(folder: Path, head: str = "bert", sparsity: float = 0.9, **save):
    kind, changes = HEADS[head]
    model = tiny.model(kind, hidden_size=64, intermediate_size=128, **changes).bfloat16()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape) < sparsity] = 0
            parameter.data[0, 0] = -0.0
    model.save_pretrained(folder, **save)
    (folder / "README.md").write_text("a card")
    return folder


def bits(path):
    return {
        file.name: {
            name: (t.dtype, t.shape, t.view(-1).view(torch.uint8).tolist())
            for name, t in load_file(file).items()
        }
        for file in path.glob("*.safetensors")
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("save", [{}, {"max_shard_size": "60KB"}])
def test_what_was_packed_unpacks_to_the_same_bits(tmp_path, head, save):
    source = write(tmp_path / "plain", head, **save)
    packed = pack_checkpoint(source, tmp_path / "packed")
    again = unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert bits(tmp_path / "again") == bits(source)
    for name in ("config.json", "README.md", "generation_config.json"):
        if (source / name).exists():
            assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors"))
        for name in ("plain", "packed")
    ]
    assert [packed.plain_bytes, packed.packed_bytes] == sizes
    assert again == packed
    index = tmp_path / "again" / "model.safetensors.index.json"
    assert index.exists() == bool(save)
    if save:
        assert index.read_bytes() == (source / index.name).read_bytes()
        want = json.loads(index.read_text())
        packed_map = json.loads((tmp_path / "packed" / index.name).read_text())["weight_map"]
        assert packed_map.keys() > want["weight_map"].keys()


def test_a_packed_file_is_plain_safetensors(tmp_path):
    source = write(tmp_path / "plain")
    pack_checkpoint(source, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    entries = packed_weights(config)
    plain = load_file(source / "model.safetensors")
    file = tmp_path / "packed" / "model.safetensors"
    assert entries
    for name, entry in entries.items():
        values = read_tensor(file, name)
        assert values.dim() == 1  # whoever loads it as the weight meets another shape
        positions = read_tensor(file, f"{name}_{entry['encoding']}")
        found = unpack(values, positions, entry["encoding"], tuple(entry["shape"]))
        assert torch.equal(found.view(torch.int16), plain[name].view(torch.int16))
    others = plain.keys() - entries.keys()
    assert all(torch.equal(read_tensor(file, name), plain[name]) for name in others)


def test_a_model_without_zeros_is_not_packed(tmp_path):
    source = write(tmp_path / "plain", sparsity=0.0)
    with pytest.raises(PackedError, match="no matrix with so many zeros"):
        pack_checkpoint(source, tmp_path / "packed")
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_position(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith(("_bitmask", "_gaps")))
    tensors[name][:] = 255
    save_file(tensors, file, {"format": "pt"})


def drop_positions(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith(("_bitmask", "_gaps")))
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})


def wider(folder):
    def widen(config):
        for entry in config["quantization_config"]["tensors"].values():
            entry["shape"] = [2 * n for n in entry["shape"]]

    change_json(folder / "config.json", widen)


def narrower(folder):
    def narrow(config):
        for entry in config["quantization_config"]["tensors"].values():
            entry["shape"] = [n // 2 for n in entry["shape"]]

    change_json(folder / "config.json", narrow)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (truncate, "model.safetensors: "),
        (flip_position, "is damaged, or of another model: "),
        (drop_positions, "but no file has "),
        (narrower, "is damaged, or of another model: "),
        (wider, "is damaged, or of another model: "),
        (
            lambda folder: (folder / "config.json").unlink(),
            "is no checkpoint: it has no config.json",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "has neither model.safetensors nor ",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a mapping"),
        (
            lambda folder: change_json(
                folder / "config.json", lambda c: c["quantization_config"].update(version=2)
            ),
            "version is 2; this mgpp reads 1",
        ),
        (
            lambda folder: change_json(
                folder / "config.json", lambda c: c["quantization_config"].update(tensors=[1])
            ),
            "quantization_config.tensors is damaged",
        ),
    ],
)
def test_damage_is_named_and_leaves_nothing(tmp_path, harm, why):
    pack_checkpoint(write(tmp_path / "plain"), tmp_path / "packed")
    harm(tmp_path / "packed")
    with pytest.raises(PackedError, match=why):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "plain"]


def test_what_cannot_be_packed_or_unpacked_is_told(tmp_path):
    source = write(tmp_path / "plain")
    pack_checkpoint(source, tmp_path / "packed")
    with pytest.raises(FileExistsError):
        pack_checkpoint(source, tmp_path / "packed")
    with pytest.raises(PackedError, match="is quantized already"):
        pack_checkpoint(tmp_path / "packed", tmp_path / "twice")
    with pytest.raises(PackedError, match="is not packed"):
        unpack_checkpoint(source, tmp_path / "again")
    with pytest.raises(PackedError, match="it has no config"):
        pack_checkpoint(tmp_path / "nowhere", tmp_path / "again")
    with pytest.raises(PackedError, match="name another folder"):
        pack_checkpoint(source, source / "packed")


def test_progress_counts_all_bytes_of_the_plain_weights(tmp_path):
    source, seen = write(tmp_path / "plain", max_shard_size="60KB"), []
    pack_checkpoint(source, tmp_path / "packed", progress=lambda *given: seen.append(given))
    number = sum(
        t.nbytes for file in source.glob("*.safetensors") for t in load_file(file).values()
    )
    assert seen[-1] == (number, number)
    assert sum(tensor_bytes(source).values()) == number
    assert sum(tensor_bytes(tmp_path / "packed", plain=True).values()) == number
    again = []
    unpack_checkpoint(
        tmp_path / "packed", tmp_path / "again", progress=lambda *given: again.append(given)
    )
    assert again[-1] == seen[-1]


@pytest.mark.parametrize("card", ["# A model\n", None])
def test_the_card_of_a_packed_copy_says_how_to_load_it(tmp_path, card):
    source = write(tmp_path / "plain")
    (source / "README.md").unlink()
    if card:
        (source / "README.md").write_text(card)
    pack_checkpoint(source, tmp_path / "packed")
    text = (tmp_path / "packed" / "README.md").read_text()
    assert text.startswith(card or "")
    assert "import mgpp.integrations.transformers" in text
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").exists() == bool(card)
    if card:
        assert (tmp_path / "again" / "README.md").read_text() == card


def test_files_that_transformers_does_not_read_are_copied_as_they_are(tmp_path):
    source = write(tmp_path / "plain")
    save_file({"x.weight": torch.zeros(256, 256)}, source / "other.safetensors")
    pack_checkpoint(source, tmp_path / "packed")
    other = (tmp_path / "packed" / "other.safetensors").read_bytes()
    assert other == (source / "other.safetensors").read_bytes()


@pytest.mark.parametrize("weight_map", [None, {"x": "../model.safetensors"}, {"x": 1}])
def test_a_damaged_index_is_named(tmp_path, weight_map):
    source = write(tmp_path / "plain", max_shard_size="60KB")
    change_json(
        source / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map)
    )
    with pytest.raises(PackedError, match=r"index.json is damaged"):
        pack_checkpoint(source, tmp_path / "packed")


def test_a_packed_folder_is_for_those_to_read_whom_the_umask_leaves_it(tmp_path):
    source, before = write(tmp_path / "plain"), os.umask(0o027)
    try:
        pack_checkpoint(source, tmp_path / "packed")
    finally:
        os.umask(before)
    for path in (tmp_path / "packed", *(tmp_path / "packed").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
