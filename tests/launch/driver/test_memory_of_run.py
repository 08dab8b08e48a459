"""A Llama of half a billion parameters from end to end: what its processes hold, and what was planned."""

import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors import safe_open

from pipeline.planner.plan import plan_run
from pipeline.runs.config import parse_config
from pipeline.runs.hardware import NO_GPUS, settled
from tests import tiny
from tests.launch.runs import Driver
from tests.processes import MGPP

pytestmark = [pytest.mark.distributed, pytest.mark.torture, pytest.mark.timeout(3000)]

VOCABULARY, MIB = 32_000, 2**20
HALF_A_BILLION = {"hidden_size": 1280, "intermediate_size": 3840, "layers": 20, "heads": 20}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2}


class Watched(threading.Thread):
    """Samples the memory of a run's processes, by what they are and whether the model is being written.

    Attributes:
        peaks: bytes by process and phase: workers before and in writing, the export.
        at_writing: bytes of each worker as the writing began.
    """

    def __init__(self, storage: Path) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[tuple[int, str], int] = defaultdict(int)
        self.at_writing: dict[int, int] = {}
        self._storage = storage
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            writes = bool(list(self._storage.glob("prune-*/a-*/model")))
            done = bool(list(self._storage.glob("prune-*/_DONE.json")))
            exports = bool(list(self._storage.glob("export-*")))
            for process in psutil.Process().children(recursive=True):
                try:
                    title, held = " ".join(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                if "RayTrainWorker" in title and not done:
                    if writes:
                        self.at_writing.setdefault(process.pid, held)
                    phase = "writing" if writes else "training"
                elif f"{MGPP} run" in title and exports:
                    phase = "export"  # on one machine the driver itself makes it
                else:
                    continue
                key = process.pid, phase
                self.peaks[key] = max(self.peaks[key], held)

    def end(self) -> None:
        self._over.set()
        self.join()

    def highest(self, phase: str) -> list[int]:
        return [held for (_, of), held in self.peaks.items() if of == phase]


def write_project(folder: Path, sizes) -> Path:
    """Write a random Llama's configuration with a tokenizer of 32,000 words, a text, and a run."""
    words = ["[UNK]", "<end>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    tokenizer = tiny.word_tokenizer(words, unknown="[UNK]", unk_token="[UNK]", eos_token="<end>")
    tokenizer.save_pretrained(folder / "model")
    config = tiny.config(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    config.save_pretrained(folder / "model")
    lines = [" ".join(f"w{(7 * i + j) % 31_000}" for j in range(30)) for i in range(60)]
    (folder / "text.txt").write_text("\n".join(lines))
    values = {
        "name": "half-a-billion",
        "storage": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "random_init": True},
        "task": {"type": "causal-lm", "text": "text", "max_length": 32},
        "data": {"source": "files", "train": str(folder / "text.txt"), "validation_share": 0.2},
        "dense": {"enabled": False},
        "train": {
            "length": 4,
            "batch_size": 2,
            "lr": 1e-5,
            "log_every": 1,
            "checkpoint_every": 100,
        },
        "prune": {"sparsity": 0.5, "start_after": 1, "finetune": 1, "interval": 1},
        "zero": {"stage": 3, "precision": "bf16", "gradients": "bf16"},
        "cluster": {"num_workers": 2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def watch(path: Path) -> tuple[Watched, dict]:
    """Run from end to end; return what was seen, and where the outputs are."""
    storage = path.parent / "runs"
    watched = Watched(storage)
    watched.start()
    try:
        with Driver([MGPP, "run", str(path)], storage) as driver:
            code, log = driver.end(timeout=1400)
    finally:
        watched.end()
    assert code == 0, log[-6000:]
    (pruned,) = storage.glob("prune-*/_DONE.json")
    manifest = json.loads(pruned.read_text())
    return watched, {"manifest": manifest, "folder": pruned.parent / manifest["url"]}


def test_half_a_billion_parameters_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back
    folders = {name: tmp_path / name for name in ("small", "large")}
    runs, plans = {}, {}
    for (name, folder), sizes in zip(folders.items(), (SMALL, HALF_A_BILLION), strict=True):
        folder.mkdir()
        path = write_project(folder, sizes)
        plans[name] = plan_run(settled(parse_config(yaml.safe_load(path.read_text())), NO_GPUS))
        runs[name] = watch(path)
        time.sleep(1)
    watched, made = runs["large"]
    size = sum(entry["bytes"] for n, entry in made["manifest"]["files"].items() if ".safetens" in n)
    assert size > 1e9
    assert len(list((made["folder"] / "model").glob("*.safetensors"))) == 2
    # What a worker holds of the large model beyond what it holds of a small one, libraries and all.
    training = max(watched.highest("training")) - max(runs["small"][0].highest("training"))
    planned = plans["large"].device_total - plans["small"].device_total
    writing = max(watched.peaks[pid, "writing"] - held for pid, held in watched.at_writing.items())
    beyond = max(watched.highest("writing")) - max(watched.highest("training"))
    exported = max(watched.highest("export"))
    figures = {
        "model": size,
        "a worker in training": training,
        "planned": planned,
        "writing, beyond its beginning": writing,
        "writing, beyond training": beyond,
        "export, in all": exported,
        "export, planned": plans["large"].export,
    }
    text = ", ".join(f"{name} {held / MIB:,.0f} MiB" for name, held in figures.items())
    sys.stdout.write(f"{text}\n")  # shown by `pytest -s`
    assert abs(training - planned) < 0.1 * planned, text
    assert beyond < 0.25 * size, text
    assert writing < (256 + 32) * MIB, text  # a round of gathered weights, and little more
    assert exported < 1024 * MIB < plans["large"].export, text
    (export,) = (tmp_path / "large" / "runs").glob("export-*/a-*/model")
    (path,) = export.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert 0.3 < float((weight == 0).float().mean()) < 0.7
