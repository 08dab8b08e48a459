"""Runs an example as its reader would and counts what it pruned: `run_example.py EXAMPLE PATH`.

Needs what the example needs, torch and mgpp; exits with 0 if exactly 90% of the prunable weights are
zero and the saved state is that of the last step.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

import mgpp


def check(example: str, path: str) -> None:
    sys.argv = [example, path]
    made = runpy.run_path(example, run_name="__main__")
    weights = dict(made["model"].named_parameters())
    prunable = [weights[name].detach() for name in mgpp.select_prunable(made["model"])]
    total, zeros = sum(w.numel() for w in prunable), sum(int((w == 0).sum()) for w in prunable)
    assert zeros == int(total * 0.9) == made["pruner"].num_zeros(), (zeros, total)
    rank = os.environ.get("RANK")
    if "trainer" in made:
        saved = Path(path) / f"checkpoint-{made['arguments'].max_steps}" / "mgpp_pruner.pt"
    else:
        saved = Path(path if rank is None else f"{path}-{rank}")
    steps = made["arguments"].max_steps if "trainer" in made else made["num_steps"]
    assert torch.load(saved, weights_only=True)["step"] == steps
    sys.stdout.write(f"mgpp {Path(mgpp.__file__).parent}\n")


if __name__ == "__main__":
    check(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without teardown: gloo's threads may abort a rank that DeepSpeed still holds
