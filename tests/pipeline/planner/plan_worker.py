"""Run on ranks: what two workers really hold at the optimizer's step, and write, in every layout."""

import gc
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mgpp.backends.deepspeed import clear_gradients
from pipeline.context import Context
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import PruneSection
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tasks import make_task
from pipeline.tasks.sequence import ClassificationConfig
from pipeline.training.checkpoint import Snapshot, TrainingState
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig, init_deepspeed
from pipeline.training.engine import make_engine
from pipeline.training.loop import attach_pruner
from pipeline.training.zero_extra import merged
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases
from tests.memory import held_bytes

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked
CASES: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage2-offload": {"stage": 2, "offload_optimizer": True},
    "stage3-offload": {"stage": 3, "offload_optimizer": True},
    **{
        f"stage{stage}-bf16{'-offload' if away else ''}{'-rounded' if rounded else ''}": {
            "stage": stage,
            "precision": "bf16",
            "offload_optimizer": away,
            "gradients": "bf16" if rounded else "fp32",
        }
        for stage in (0, 1, 2, 3)
        for away in (False, True)
        for rounded in (False, True)
        if not (stage == 0 and (away or rounded)) and not (away and rounded and stage != 2)
    },
    "stage1-fp16": {"stage": 1, "precision": "fp16"},
    "stage3-bf16-offload-parameters": {
        "stage": 3,
        "precision": "bf16",
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}
# Nothing is kept whole, or from the forward pass to the backward pass, as no large model can be.
EXTRA = {
    "zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
}
# As on GPUs, where blocks under offload are pinned.
_AWAY = {"device": "cpu", "pin_memory": True}
PINNED = {"zero_optimization": {"offload_optimizer": _AWAY}}
PINNED_PARAMETERS = {"zero_optimization": {"offload_optimizer": _AWAY, "offload_param": _AWAY}}
ACCUMULATION = 2
BUCKET = 2000


class Sent(TorchDispatchMode):
    """Counts what this worker hands to collectives, as ring algorithms send it.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.size = 0.0
        self._share = (world_size - 1) / world_size

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = operation.name().partition("::")
        if namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            if name == "allreduce_":  # a reduce-scatter and a gather
                self.size += 2 * self._share * sum(map(_bytes, tensors))
            elif name in ("_allgather_base_", "broadcast_"):
                self.size += self._share * sum(map(_bytes, tensors))
            elif name == "_reduce_scatter_base_":
                self.size += self._share * _bytes(args[1])
            elif name != "barrier":
                raise AssertionError(f"{name} is not counted")
        return operation(*args, **(kwargs or {}))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def pins_of(case: str) -> dict[str, Any]:
    """Return the further keys of DeepSpeed by which a case pins what it would on a GPU."""
    return PINNED_PARAMETERS if "parameters" in case else PINNED


def count_pinned() -> list[int]:
    """Return a list of the blocks that DeepSpeed pins from now on, in bytes; a CPU pins none of them."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    pinned: list[int] = []

    def pin_memory(_: Any, tensor: torch.Tensor, **__: Any) -> torch.Tensor:
        pinned.append(tensor.nbytes)
        return tensor

    CPU_Accelerator.pin_memory = pin_memory
    return pinned


def measure(case: str, bert: str, folder: Path) -> dict[str, Any]:
    """Return what one worker holds at the end of the inner optimizer's second step, and all write."""
    gc.collect()
    before = set(held_bytes())
    extra = EXTRA | ({"fp16": {"initial_scale_power": 3}} if "fp16" in case else {})
    if "offload" in case:
        extra = merged(extra, pins_of(case))
    zero = ZeroConfig(**{"precision": "fp32", **CASES[case]}, bucket_elements=BUCKET, extra=extra)
    config = TrainConfig(batch_size=4 * ACCUMULATION, micro_batch_size=2)
    plan = config.batch_plan(num_rows=8, world_size=2)
    prune = PruneSection(sparsity=0.5)
    task = make_task(ClassificationConfig(type="classification", text=["text"], label="label"))
    model = ModelConfig(path=bert)
    workers = WorkerGroup.current()
    context = Context(
        inputs={},
        model_kwargs={"num_labels": 2},
        output=folder,
        workers=workers,
        checkpoints=CheckpointStore(str(folder / "checkpoints"), workers),
        progress=lambda record: None,
    )
    pinned = count_pinned()
    engine = make_engine(context, model, task, config, zero, prune, plan)
    pruner = attach_pruner(engine, prune, prune.settings.schedule(100, 10), num_examples=8)
    found: list[int] = []
    counted: list[float] = []

    def at_step(*_: Any) -> None:
        found.append(sum(size for at, size in held_bytes().items() if at not in before))

    engine.basic_optimizer.register_step_post_hook(at_step)
    for _ in range(2):
        clear_gradients(engine)
        for _ in range(ACCUMULATION):
            tokens = torch.randint(5, 20, (2, 3))
            with Sent(workers.world_size) as sent:
                engine.backward(engine(input_ids=tokens, labels=torch.tensor([0, 1])).loss)
                engine.step()
            counted.append(sent.size)
    snapshot = Snapshot(
        engine=engine, pruner=pruner, records=None, done=TrainingState(), workers=workers
    )
    before_copy = set(held_bytes())
    snapshot.copy_to_host()
    copied = sum(size for at, size in held_bytes().items() if at not in before_copy)
    context.checkpoints.save(snapshot.write, 1)
    dist.barrier()
    written = (folder / "checkpoints").rglob("*")
    checkpoint = sum(file.stat().st_size for file in written if file.is_file())
    dist.barrier()
    if workers.is_main:
        context.checkpoints.discard()
    engine.destroy()
    # Of the second step: the first one may prune.
    return {
        "held": max(found[len(found) // 2 :]),
        "pinned": pinned,
        "checkpoint": checkpoint,
        "copied": copied,
        "sent": sum(counted[ACCUMULATION:]),
    }


def measure_and_write(case: str, bert: str, folder: Path) -> None:
    found = measure(case, bert, folder)
    if dist.get_rank() == 0:
        (folder / f"{case}.json").write_text(json.dumps(found))


def main(bert: str, folder: str) -> None:
    """Measure all layouts and write what rank 0 holds."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    dist.init_process_group("gloo")
    init_deepspeed("gloo")
    CPU_Accelerator.is_fp16_supported = lambda _: True  # slow on most CPUs, but it computes
    cases = {case: partial(measure_and_write, case, bert, Path(folder)) for case in CASES}
    run_cases(Path(folder), cases, seconds=120)
