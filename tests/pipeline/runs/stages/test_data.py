"""The data stage: killed and resumed, it makes the same files; what it used besides is gone."""

import os
import random
import subprocess
import sys
import time

import pytest

from pipeline.runs.config import parse_config
from pipeline.runs.flow import plan_stages, run_stage
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.parts import parts_folder
from tests.pipeline.models.word_chains import text
from tests.processes import ROOT
from tests.tiny import write_decoder


def prepare(folder, storage, cores, progress=lambda record: None):
    """Run the data stage on what `corpus` has written."""
    config = settled(
        parse_config(
            {
                "name": "corpus",
                "storage": storage,
                "model": {"path": f"{folder}/llama"},
                "task": {"type": "causal-lm", "max_length": 64},
                "data": {"source": "files", "train": f"{folder}/corpus.txt"},
                "train": {"length": 10},
                "prune": {"sparsity": 0.5},
            }
        ),
        NO_GPUS,
    )
    stage = plan_stages(config)[0]
    store = ArtifactStore(storage)
    artifact = run_stage(stage, config, store, {}, workers=None, progress=progress, cores=cores)
    assert not parts_folder(store, stage.name, stage.key).exists()
    return {name: entry["blocks"] for name, entry in artifact.files.items()}


@pytest.fixture
def corpus(tmp_path, datasets_cache):
    write_decoder("llama", tmp_path / "llama")
    documents = [text(300, seed) for seed in range(10)]
    draw = random.Random(0)
    with (tmp_path / "corpus.txt").open("w") as file:
        for _ in range(3000):
            file.write(f"{draw.choice(documents)[4 * draw.randrange(100) :].lstrip()}\n")
    return tmp_path


@pytest.mark.slow
def test_a_killed_stage_is_resumed_to_the_same_files(corpus, url):
    undisturbed = prepare(corpus, str(corpus / "undisturbed"), cores=1)
    command = [sys.executable, "-m", "tests.pipeline.runs.stages.test_data", str(corpus), url]
    cache = {"HF_DATASETS_CACHE": str(corpus / "cache")}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **cache})
    store = ArtifactStore(url)
    root = parts_folder(store, "data", "0").parent
    root = root if not store.is_local else root.parent
    try:
        deadline = time.monotonic() + 120
        while not list(root.rglob("tokenize/train/*-*.arrow")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(timeout=30)
    records = []
    assert prepare(corpus, url, 3, records.append) == undisturbed
    notes = [record["text"] for record in records if record["event"] == "note"]
    assert notes[0].startswith("tokenize train: ")
    assert records[-1]["what"] == "pack validation"


if __name__ == "__main__":
    prepare(*sys.argv[1:], cores=2)
