"""Artifacts that are not what was committed, between two runs of one store: made again, and said."""

import json
import shutil

import pytest
from rich.console import Console

from launch.cluster.connect import connected
from launch.driver.run import nodes_cleared, run_stages
from pipeline.runs.config import parse_config, read_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.storage.filesystems import open_storage
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.maintenance import entries
from pipeline.store.verification import verified
from tests.run_file import write_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
MODEL = "model/model.safetensors"


@pytest.fixture(scope="module")
def project(bucket, tiny_bert, words_csv, tmp_path_factory):
    """A small run on one worker, and the cluster, which knows the bucket, that all of them share."""
    path = write_run(
        tmp_path_factory.mktemp("contents"),
        tiny_bert,
        words_csv,
        train={"length": 6, "batch_size": 8},
        dense={"length": 2},
        prune={"sparsity": 0.5, "start_after": 2, "finetune": 2, "interval": 2},
        zero={"stage": 0, "precision": "fp32"},
        cluster={"num_workers": 1, "gpus_per_worker": 0},
    )
    with connected(configured(path).cluster):
        yield path


def configured(path, *changes):
    values, problems = read_config(str(path), list(changes))
    assert not problems
    return settled(parse_config(values), NO_GPUS)


def go(project, storage, *changes):
    """Run; return the result and what was said."""
    config = configured(project, *changes)
    console = Console(width=300, record=True, quiet=False)
    store = ArtifactStore(storage)
    with nodes_cleared(store):
        result = run_stages(plan_stages(config), config, store, console)
    return result, [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture(scope="module")
def first(project):
    """What a run left where nothing happened to it."""
    return go(project, str(project.parent / "storage"))[0]


@pytest.fixture
def storage(first, project, tmp_path):
    """A store of its own with what that run left."""
    shutil.copytree(project.parent / "storage", tmp_path / "storage")
    return str(tmp_path / "storage")


def at(storage, artifact, name=""):
    """Return where a file of an artifact of the first run is in another storage."""
    filesystem, root = open_storage(storage)
    return filesystem, "/".join([root, *artifact.url.split("/")[-2:], name])


def flip(storage, artifact, name):
    """Flip a bit in the middle of a file."""
    filesystem, path = at(storage, artifact, name)
    data = bytearray(filesystem.cat_file(path))
    data[len(data) // 2] ^= 1
    filesystem.pipe_file(path, bytes(data))


def content(artifact, name):
    filesystem, root = open_storage(artifact.url)
    return filesystem.cat_file(f"{root}/{name}")


def is_whole(storage):
    """Return whether every artifact is what was committed."""
    return not any(verified(entry).damage for entry in entries(ArtifactStore(storage)))


def test_a_token_of_the_rows_and_a_bit_of_the_dense_model_are_seen(project, first, storage):
    rows = next(name for name in first.artifacts["data"].files if "validation/data-" in name)
    flip(storage, first.artifacts["data"], rows)
    flip(storage, first.artifacts["dense"], MODEL)
    result, said = go(project, storage, "evaluate.batch_size=5")
    assert f"data      made again: {rows} has another checksum" in said
    assert f"dense     made again: {MODEL} has another checksum" in said
    assert result.cached == ["prune"]
    assert result.artifacts["prune"].url.endswith(first.artifacts["prune"].url.split("/")[-1])
    assert content(result.artifacts["dense"], MODEL) == content(first.artifacts["dense"], MODEL)
    again = result.artifacts["data"]
    assert again.key == first.artifacts["data"].key
    assert content(again, rows) == content(first.artifacts["data"], rows)
    assert result.artifacts["evaluate"].metrics == first.artifacts["evaluate"].metrics
    assert is_whole(storage)
    again, said = go(project, storage, "evaluate.batch_size=5")
    assert again.cached == list(again.artifacts)
    assert not [line for line in said if "made again" in line]


def test_what_is_gone_cut_off_or_edited_is_made_again(project, first, storage):
    rows = next(name for name in first.artifacts["data"].files if "train/data-" in name)
    filesystem, path = at(storage, first.artifacts["data"], rows)
    filesystem.pipe_file(path, filesystem.cat_file(path)[:-1])
    _, path = at(storage, first.artifacts["export"], MODEL)
    filesystem.rm(path)
    _, path = at(storage, first.artifacts["evaluate"])
    manifest = f"{path.rsplit('/', 2)[0]}/_DONE.json"
    values = json.loads(filesystem.cat_file(manifest))
    values["metrics"]["pruned"]["accuracy"] = 0.9999
    filesystem.pipe_file(manifest, json.dumps(values).encode())

    result, said = go(project, storage)
    size = first.artifacts["data"].files[rows]["bytes"]
    assert f"data      made again: {rows} has {size - 1} bytes, not {size}" in said
    assert f"export    made again: {MODEL} is missing" in said
    edited = "_DONE.json: it was changed after it was written (another checksum)"
    assert f"evaluate  made again: {edited}" in said
    assert result.cached == ["dense", "prune", "report"]
    for stage in ("data", "evaluate", "export"):
        assert result.artifacts[stage].url != first.artifacts[stage].url
    assert result.artifacts["evaluate"].metrics == first.artifacts["evaluate"].metrics
    card = content(result.artifacts["export"], "model/README.md")
    assert card == content(first.artifacts["export"], "model/README.md")
    assert b"99.99" not in card
    assert is_whole(storage)


@pytest.mark.torture
def test_a_bit_of_the_dense_model_is_seen_on_s3_and_no_copy_is_left(
    project, first, bucket, cache_folder
):
    storage = f"{bucket}/runs"
    filesystem, root = open_storage(storage)
    filesystem.put(f"{project.parent / 'storage'}/", f"{root}/", recursive=True)
    flip(storage, first.artifacts["dense"], MODEL)
    result, said = go(project, storage, "evaluate.batch_size=5")
    assert f"dense     made again: {MODEL} has another checksum" in said
    assert result.cached == ["data", "prune"]
    assert content(result.artifacts["dense"], MODEL) == content(first.artifacts["dense"], MODEL)
    assert result.artifacts["evaluate"].metrics == first.artifacts["evaluate"].metrics
    assert is_whole(storage)
    assert list((cache_folder / "artifacts").iterdir()) == []
