"""Whole weights out of a sharded model, and fingerprints to compare what was trained with what loads."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.worker_group import WorkerGroup

WEIGHTS_FILE = "weights.json"


def full_state_dict(
    model: nn.Module, workers: WorkerGroup, *, partitioned: bool
) -> dict[str, Tensor]:
    """Return all weights on the CPU of the main worker ({} elsewhere).

    Under ZeRO 3 they are gathered one parameter at a time, so that a device never holds more than
    one; the main worker's CPU memory must hold the whole model once.

    Args:
        model: the module a DeepSpeed engine trains.
        workers: all of them; all must call.
        partitioned: whether parameters are sharded (ZeRO 3).
    """
    if not partitioned:
        return {n: _on_cpu(t) for n, t in model.state_dict().items()} if workers.is_main else {}
    import deepspeed

    gathered: dict[int, Tensor] = {}
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if workers.is_main:
                gathered[id(parameter)] = _on_cpu(parameter)
    if not workers.is_main:
        return {}
    tensors = model.state_dict(keep_vars=True)  # tied weights share one object, and so one copy
    return {n: gathered.get(id(t), t.detach().cpu()) for n, t in tensors.items()}


def positive_zeros(tensor: Tensor) -> Tensor:
    """Return the tensor with every -0.0 as 0.0; other values are untouched."""
    return tensor + 0 if tensor.is_floating_point() else tensor


def fingerprints(named: Iterable[tuple[str, Tensor]], prunable: Iterable[str]) -> dict[str, Any]:
    """Return shape, dtype, sha256 and (for prunable weights) zeros of each tensor, -0.0 as 0.0."""
    counted = set(prunable)
    found: dict[str, Any] = {}
    for name, tensor in named:
        values = positive_zeros(tensor.detach().cpu()).contiguous()
        found[name] = {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(values.view(-1).view(torch.uint8).numpy().data).hexdigest(),
        }
        if name in counted:
            found[name]["zeros"] = int((values == 0).sum())
    return found


def write_model(
    output: Path, model: Any, state: dict[str, Tensor], *, tokenizer: Any, prunable: Iterable[str]
) -> None:
    """Write `output/model`, a Hugging Face checkpoint, and fingerprints of its parameters beside it.

    Args:
        output: the stage's folder.
        model: the transformers model.
        state: all its weights, whole.
        tokenizer: goes with it.
        prunable: names of its prunable weights.
    """
    # A copy of the dict, which transformers empties as it writes.
    model.save_pretrained(output / "model", state_dict=dict(state), max_shard_size="5GB")
    tokenizer.save_pretrained(output / "model")
    names = [name for name, _ in model.named_parameters()]
    found = fingerprints(((name, state[name]) for name in names), prunable)
    (output / WEIGHTS_FILE).write_text(json.dumps(found, indent=1))


def _on_cpu(tensor: Tensor) -> Tensor:
    return positive_zeros(tensor.detach().to("cpu", copy=True))
