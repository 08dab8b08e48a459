"""The README's example of a method, run as it stands there."""

import re
from typing import Any

import pytest
import torch

from mgpp import PruningSchedule
from mgpp.backends.torch import attach
from tests.processes import ROOT


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
