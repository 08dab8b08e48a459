"""Pieces of parameters in files: whatever the cuts they were written in, any range reads back."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mgpp.backends.deepspeed import TrainedShard
from mgpp.sharding.bitmask import pack_bits, unpack_bits
from pipeline.errors import StageError
from pipeline.storage.checksums import describe
from pipeline.storage.verified import VerifiedFiles
from pipeline.store.checkpoints import (
    CheckpointFiles,
    CheckpointStore,
    Manifest,
    SavedCheckpoint,
)
from pipeline.training import checkpoint_shards as pieces
from pipeline.training.checkpoint_shards import ShardReader, ShardWriter
from pipeline.worker_group import WorkerGroup

SIZE = 40
VALUES = {
    key: np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)
    for seed, key in enumerate(("master", "exp_avg"))
}
KEEP = np.random.default_rng(9).random(SIZE) < 0.5


def cuts_into(bounds):
    """Return the ranges between 0, the bounds and SIZE; some may be empty."""
    ends = [0, *sorted(bounds), SIZE]
    return list(pairwise(ends))


def write(folder, ranges, name="layer.weight"):
    for rank, (begin, end) in enumerate(ranges):
        writer = ShardWriter(rank)
        values = {key: torch.from_numpy(array[begin:end]) for key, array in VALUES.items()}
        piece = TrainedShard(
            name=name, offset=begin, numel=end - begin, values=values, counters={"step": 7.0}
        )
        writer.add_trained([piece])
        keep = pack_bits(torch.from_numpy(KEEP[begin:end]))
        state = {"score": torch.from_numpy(VALUES["exp_avg"][begin:end].copy())}
        mask = {
            "name": name,
            "offset": begin,
            "numel": end - begin,
            "keep": keep,
            "state": state,
        }
        writer.add_masks([mask])
        writer.write(files_of(folder, rank))


def files_of(folder, rank):
    return CheckpointFiles(LocalFileSystem(), str(folder), rank)


def reader(folder, first=0):
    """Return a reader of the folder, and the bytes that are read of each file."""
    entries = {path.name: describe(path) for path in folder.iterdir()}
    files = VerifiedFiles(LocalFileSystem(), str(folder), entries)
    manifest = Manifest(step=1, world_size=1, files=entries)
    return ShardReader(SavedCheckpoint(manifest, files), first)


bounds = st.lists(st.integers(0, SIZE), max_size=4)


@settings(max_examples=30)
@given(written=bounds, read=bounds, first=st.integers(0, 5))
def test_any_range_reads_back_whatever_the_cuts(tmp_path_factory, written, read, first):
    folder = tmp_path_factory.mktemp("pieces")
    write(folder, cuts_into(written))
    saved = reader(folder, first)
    for begin, end in cuts_into(read):
        if begin == end:
            continue
        values, counters = saved.trained("layer.weight", begin, end - begin)
        assert counters == {"step": 7.0}
        assert values.keys() == VALUES.keys()
        for key, value in values.items():
            np.testing.assert_array_equal(value.numpy(), VALUES[key][begin:end])
        found = np.zeros(SIZE, bool)
        for mask in saved.masks("layer.weight", begin, end - begin):
            bits = unpack_bits(mask["keep"], mask["numel"]).numpy()
            there = VALUES["exp_avg"][mask["offset"] : mask["offset"] + mask["numel"]]
            np.testing.assert_array_equal(mask["state"]["score"].numpy(), there)
            found[mask["offset"] : mask["offset"] + mask["numel"]] = bits
        np.testing.assert_array_equal(found[begin:end], KEEP[begin:end])


def test_a_worker_that_finds_its_own_pieces_reads_no_other_file(tmp_path):
    write(tmp_path, [(0, 24), (24, SIZE)])
    for path in tmp_path.glob("*r00000*"):
        path.write_text("not to be read")
    values, _ = reader(tmp_path, first=1).trained("layer.weight", 24, SIZE - 24)
    np.testing.assert_array_equal(values["master"].numpy(), VALUES["master"][24:])


def test_files_are_bounded_and_plain_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_FILE_BYTES", 100)
    writer = ShardWriter(3)
    for i in range(5):
        values = {"master": torch.full((16,), float(i))}
        piece = TrainedShard(name=f"w{i}", offset=0, numel=16, values=values, counters={})
        writer.add_trained([piece])
    writer.write(files_of(tmp_path, 3))
    files = sorted(tmp_path.glob("state-*.safetensors"))
    assert [file.name for file in files] == [f"state-r00003-0000{i}.safetensors" for i in range(3)]
    with safe_open(str(files[1]), framework="np") as file:
        assert sorted(file.keys()) == ["w2:0:master", "w3:0:master"]
    index = json.loads((tmp_path / "index-r00003.json").read_text())
    assert [entry["file"] for entry in index] == [files[i // 2].name for i in range(5)]
    saved = reader(tmp_path)
    for i in range(5):
        assert saved.trained(f"w{i}", 3, 5)[0]["master"].tolist() == [float(i)] * 5


def test_a_checkpoint_of_an_earlier_version_is_read_and_its_damage_found(tmp_path):
    """Files by `safetensors.save_file`, and one sha256 of each in the manifest."""
    folder = tmp_path / "step-00000007-abcdef"
    folder.mkdir()
    tensors = {f"w:0:{key}": torch.from_numpy(array) for key, array in VALUES.items()}
    save_file(tensors, folder / "state-r00000-00000.safetensors")
    range_ = {"name": "w", "offset": 0, "numel": SIZE, "keys": list(VALUES), "counters": {}}
    index = [{**range_, "file": "state-r00000-00000.safetensors"}]
    (folder / "index-r00000.json").write_text(json.dumps(index))
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rank": 0,
        }
        for path in folder.iterdir()
    }
    manifest = {"step": 7, "world_size": 1, "files": files}
    (folder / "_DONE.json").write_text(json.dumps(manifest))
    notes = []
    store = CheckpointStore(str(tmp_path), WorkerGroup.alone(), notify=notes.append)

    def load(saved):
        return ShardReader(saved, first=0).trained("w", 3, 30)[0]

    for key, value in store.restore(load).items():
        np.testing.assert_array_equal(value.numpy(), VALUES[key][3:33])
    shards = folder / "state-r00000-00000.safetensors"
    content = bytearray(shards.read_bytes())
    content[-1] ^= 1
    shards.write_bytes(content)
    assert store.restore(load) is None
    assert "state-r00000-00000.safetensors has another checksum" in notes[-1]


def test_what_is_not_there_is_named(tmp_path):
    write(tmp_path, [(0, 24)])
    saved = reader(tmp_path)
    with pytest.raises(StageError, match=r"no master of layer\.weight from element 24 on"):
        saved.trained("layer.weight", 10, 30)
    with pytest.raises(StageError, match=r"no keep of other\.weight from element 0 on"):
        list(saved.masks("other.weight", 0, 4))
