"""The README's examples, each run as it stands there."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mgpp import PruningSchedule
from mgpp.backends.torch import attach
from tests.processes import ROOT, run

COMMON = """
import os, sys
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch, mgpp
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=16,
))
path, rank = sys.argv[1], int(os.environ.get("RANK", 0))
num_steps, num_examples = 20, 160
dataset = [
    {"input_ids": torch.randint(30, (6,)), "labels": torch.tensor(i % 2)} for i in range(160)
]
batches = torch.utils.data.DataLoader(dataset, batch_size=8)
"""
BEFORE = {
    "Plain torch": "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)",
    "DeepSpeed": """
import deepspeed
from deepspeed.ops import __compatible_ops__
__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
deepspeed_config = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 2, "allgather_bucket_size": 10000, "reduce_bucket_size": 10000
    },
}
""",
    "Accelerate": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
""",
    "`transformers.Trainer`": """
from transformers import Trainer, TrainingArguments
from mgpp.integrations.transformers import PruningCallback
arguments = TrainingArguments(
    path, max_steps=num_steps, per_device_train_batch_size=8, use_cpu=True, report_to=[]
)
""",
}
AFTER = """
pruner = callback.pruner if "callback" in globals() else pruner
weights = dict(model.named_parameters())
prunable = [weights[name] for name in mgpp.select_prunable(model)]
total, zeros = sum(w.numel() for w in prunable), sum(int((w == 0).sum()) for w in prunable)
assert zeros == int(total * 0.9) == pruner.num_zeros(), (zeros, total)
assert abs(pruner.sparsity - 0.9) < 1e-3
if "trainer" not in globals():
    saved = torch.load(f"{path}-{rank}" if "engine" in globals() else path, weights_only=True)
    assert saved["step"] == num_steps
if "engine" in globals():
    from tests.processes import leave
    leave()
"""


def examples() -> dict[str, str]:
    """Return the code blocks of the section, by the words their paragraph begins with."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## In a training loop of your own")[1].split("\n## ")[0]
    found = re.findall(r"\n\n([^\n]+(?:\n[^\n]+)*)\n\n```python\n(.*?)```", section, re.DOTALL)
    return {re.split(r"[,:]", words)[0]: code for words, code in found}


def test_there_is_an_example_of_every_kind():
    assert set(examples()) == set(BEFORE)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", BEFORE)
def test_the_example_prunes_exactly(kind, tmp_path: Path):
    script = tmp_path / "example.py"
    script.write_text(COMMON + BEFORE[kind] + "\n" + examples()[kind] + AFTER)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    if kind == "DeepSpeed":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run(command, timeout=180, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-6000:]


def test_the_example_of_a_method_prunes_by_its_score():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(from dataclasses.*?)```", text, re.DOTALL)[0]
    module: dict[str, Any] = {"__name__": "example"}
    exec(code, module)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, generator=generator))
    before, mean_square = weight.detach().clone(), torch.zeros(40)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    schedule = PruningSchedule(
        num_steps=4, warmup_steps=2, finetune_steps=0, interval=1, final_sparsity=0.6
    )
    method = module["RootMeanSquare"](decay=0.5)
    pruner = attach(optimizer, {"w": weight}, method=method, schedule=schedule)
    for _ in range(4):
        weight.grad = torch.randn(40, generator=generator)
        mean_square = 0.5 * mean_square + 0.5 * weight.grad**2
        optimizer.step()
    expected = (before.abs() * mean_square.sqrt()).argsort()[:24]
    assert pruner.last_pruning.num_pruned == 24
    assert set((weight == 0).nonzero().squeeze(1).tolist()) == set(expected.tolist())
    with pytest.raises(ValueError, match="decay must be less than 1"):
        module["RootMeanSquare"](decay=1.0)
