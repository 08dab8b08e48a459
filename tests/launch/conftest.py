"""A project folder as a user would have it: a tiny random BERT, rows and a configuration."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster
from transformers import BertForSequenceClassification

from tests import tiny
from tests.launch.runs import LONGER, outcome, run_in_background
from tests.processes import MGPP, ROOT, run

# And this checkout, whichever one is installed.
ONE_GPU = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "one_gpu"), str(ROOT)])}
SECRETS = {
    name: f"sentinel-{name.lower()}-4f1d"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_DATABASE_URL")
}
TAKEN_NAMES = ("pipeline", "launch", "mgpp", "torch", "ray", "transformers", "datasets", "json")
UMASK = 0o027
SYLLABLES = ["ba", "do", "ke", "lu", "mi", "no", "pa", "ri", "so", "tu"]


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with a tiny random BERT, data and a configuration, as a user would have."""
    folder = tmp_path_factory.mktemp("project")
    words = [a + b for a in SYLLABLES for b in SYLLABLES]
    tiny.write_bert(
        folder / "bert",
        [*tiny.BERT_SPECIAL, *words],
        BertForSequenceClassification,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=3,
        max_position_embeddings=16,
    )
    rows = [f"{a} {b}\t{int(a < b)}" for a in words[::3] for b in words[1::4]]
    (folder / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]))
    config = {
        "name": "tiny",
        "storage": str(folder / "runs"),
        "model": {"path": str(folder / "bert")},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 8},
        "data": {"source": "files", "train": str(folder / "rows.tsv"), "validation_share": 0.2},
        "train": {
            "length": 24,
            "batch_size": 16,
            "micro_batch_size": 4,
            "lr": 0.002,
            "log_every": 4,
        },
        "dense": {"length": 8},
        "prune": {
            "sparsity": 0.8,
            "initial_sparsity": 0.2,
            "start_after": 4,
            "finetune": 6,
            "interval": 4,
        },
        "zero": {"stage": 3},
        "cluster": {"num_workers": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def mgpp(
    project: Path,
    *arguments: str,
    timeout: float = 420,
    env: Mapping[str, str] | None = None,
    **settings: Any,
):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(project / "hf"), **(env or {})}
    return run([MGPP, *arguments], timeout=timeout, env=environment, **settings)


@pytest.fixture
def cluster(monkeypatch):
    """A head of no cores, to which a test adds nodes: processes of this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="session")
def ray_folder():
    """Where the first run's Ray writes; its sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def first_run(project, ray_folder, tmp_path_factory):
    """A run on CPUs, of processes in which torch says that there is a GPU.

    The working folder has modules with the names of ours and of what we need, the environment secrets,
    and files are for the group to read, but not for all.
    """
    folder = tmp_path_factory.mktemp("names-of-others")
    for name in TAKEN_NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('this is no {name} of mgpp')\n")
    on_cpus = [str(project / "run.yaml"), "cluster.gpus_per_worker=0"]
    environment = {**ONE_GPU, **SECRETS, "RAY_TMPDIR": str(ray_folder)}
    where = {"env": environment, "cwd": folder, "umask": UMASK}
    done = mgpp(project, "run", *on_cpus, "--json", **where)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.fixture(scope="session")
def summary(first_run):
    lines = first_run.stdout.strip().splitlines()
    assert len(lines) == 1, lines
    return json.loads(lines[0])


@pytest.fixture(scope="session")
def undisturbed(project, tmp_path_factory):
    """What a longer run leaves where nothing happens to it."""
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    with run_in_background(project, storage, *LONGER) as run:
        code, log = run.end()
    assert code == 0, log[-6000:]
    return outcome(storage)
