"""One trial: a student is pruned on n samples of a planted teacher; what it found of the structure."""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mgpp
from tests.consistency.planted import (
    KNOWN,
    NOISE,
    draw_samples,
    make_student,
    plant_teacher,
    predict,
    support_metrics,
)

METHODS: dict[str, dict[str, Any]] = {
    "mgpp": {"name": "mgpp", "spike_threshold": 1.0, "slab_var": 1.0},
    "gmp": {"name": "gmp"},
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one trial is; all of it names its result."""

    n: int
    method: str
    seed: int
    num_steps: int = 1000
    batch_size: int = 32
    lr: float = 2e-2
    sparsity: float = 0.9
    start_after: float = 0.2
    finetune: float = 0.2


def run_trial(trial: Trial) -> dict[str, Any]:
    """Train and prune the student; return the trial with its figures.

    The loss is the negative log-likelihood of one sample, so the prior has the weight that it has in the
    posterior. Every trial takes as many steps, however few its samples.
    """
    started = time.process_time()
    teacher, names = plant_teacher(trial.seed, trial.sparsity)
    tokens, outputs = draw_samples(teacher, trial.n, seed=1000 + trial.seed)
    student = make_student(teacher, names, seed=2000 + trial.seed)
    true = _flat(teacher, names) != 0
    k = int(true.sum())
    at_start = _flat(student, names).abs()
    optimizer = torch.optim.AdamW(
        [student.get_parameter(name) for name in names],
        lr=trial.lr,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.0,
    )
    config = mgpp.PruningConfig(
        sparsity=trial.sparsity,
        start_after=trial.start_after,
        finetune=trial.finetune,
        method=METHODS[trial.method],
        exclude=KNOWN,
    )
    mgpp.attach((student, optimizer), config, trial.num_steps, trial.n)
    generator = torch.Generator().manual_seed(3000 + trial.seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(trial.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = trial.lr * (1 - 0.95 * step / trial.num_steps)
        while len(order) < min(trial.batch_size, trial.n):
            order = torch.cat([order, torch.randperm(trial.n, generator=generator)])
        rows, order = order[: trial.batch_size], order[trial.batch_size :]
        errors = student(input_ids=tokens[rows]).logits - outputs[rows]
        (errors.square().sum(dim=(1, 2)).mean() / (2 * NOISE**2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    fresh, clean = draw_samples(teacher, 2048, seed=4000 + trial.seed, noise=0.0)
    largest = torch.zeros_like(true)
    largest[at_start.topk(k).indices] = True
    return {
        **asdict(trial),
        **support_metrics(_flat(student, names) != 0, true),
        "f1_at_start": support_metrics(largest, true)["f1"],
        "error": float((predict(student, fresh) - clean).square().mean() / clean.var()),
        "cpu_seconds": time.process_time() - started,
    }


def path_of(trial: Trial, folder: Path) -> Path:
    """Name a trial's result by all that the trial is."""
    digest = hashlib.sha256(json.dumps(asdict(trial), sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{trial.method}-n{trial.n}-seed{trial.seed}-{digest}.json"


def run_and_keep(trial: Trial, folder: Path) -> dict[str, Any]:
    """Run a trial unless its result is there."""
    path = path_of(trial, folder)
    if not path.exists():
        torch.set_num_threads(1)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(run_trial(trial), indent=1) + "\n")
        beside.replace(path)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _flat(model: Any, names: list[str]) -> Tensor:
    return torch.cat([model.get_parameter(name).detach().view(-1) for name in names])
