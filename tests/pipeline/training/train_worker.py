"""Run on ranks: trains the tiny BERT whole, then interrupted and resumed, and writes what came out."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from pipeline import host_memory
from pipeline.context import Context, never
from pipeline.errors import RunStoppedError, StageError
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import METHOD_CONFIGS, PruneSection
from pipeline.store.checkpoints import CheckpointStore, Write
from pipeline.tasks import make_task
from pipeline.tasks.sequence import ClassificationConfig, RegressionConfig
from pipeline.training import loop
from pipeline.training.batch_mean import WHOLE
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.training.distill import DistillConfig
from pipeline.training.loop import train
from pipeline.training.teacher import TeacherSpec
from pipeline.worker_group import WorkerGroup
from tests.cases import run_cases

SLOW_IMPORTS = ("tests.slow_imports",)  # before the ranks are forked
CASES: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage2-bf16": {"stage": 2, "precision": "bf16"},
    "stage2-fp16": {
        "stage": 2,
        "precision": "fp16",  # the scale is looked for throughout the run
        "extra": {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 4}},
    },
}
OVERFLOWS = {  # settings of a loss scale that is never small enough
    "static": {"loss_scale": 2.0**60},
    "smallest": {"initial_scale_power": 60, "min_loss_scale": 2**59},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    **CASES,
    "stage1": {"stage": 1},
    "stage2-offload": {"stage": 2, "offload_optimizer": True},
    **{
        f"overflow-{name}": {
            "stage": 2,
            "precision": "fp16",
            "extra": {"fp16": {"enabled": True, "hysteresis": 1, **scale}},
        }
        for name, scale in OVERFLOWS.items()
    },
    "stage3-small": {
        "stage": 3,
        "extra": {
            "zero_optimization": {
                "sub_group_size": 700,
                "stage3_param_persistence_threshold": 0,
            }
        },
    },
}
GROUPED = "stage2-bf16"  # the case whose batches are grouped by length
METHOD_OF = {"stage0": "platon", "stage3": "soft-movement"}  # what keeps state of every weight
NAN_CASES = ("stage2", "stage3")
DAMAGED = "stage3"  # the case that is also resumed where every checkpoint is damaged
DISTILLED = ("stage2", "stage3-small")  # the last with all of both models sharded
DISTILL_STOP = 9
TEACHER = "stage0"  # the case whose whole run makes the teacher
ASKED = "stage3"  # the case that is also asked to stop, after ASKED_AT steps
ASKED_AT = 8
ALL_CASES = (
    *CASES,
    "asked",
    "counted",
    *(f"distilled-{case}" for case in DISTILLED),
    "silent",
    "damaged",
    *(f"{case}-nan" for case in NAN_CASES),
    *(f"overflow-{name}" for name in OVERFLOWS),
    "uncompiled",
)
LENGTH, STOP_AFTER = 20, (2, 9, 17)  # warm-up, gradual, fixed mask


class InterruptedRunError(Exception):
    """Stands for the death of the run."""


class StoppingCheckpoints(CheckpointStore):
    """Stops the run after the checkpoint of a step is saved."""

    stop_at: int | None = None

    def save(self, write: Write, step: int, *, in_background: bool = False) -> None:
        if self.stop_at is None:
            return
        super().save(write, step, in_background=in_background)
        if step == self.stop_at:
            self.settle()
            dist.barrier()
            raise InterruptedRunError


CLASSIFICATION = ClassificationConfig(type="classification", text=["text"], label="label")
REGRESSION = RegressionConfig(type="regression", text=["text"], label="label")


TRAIN = TrainConfig(
    length=LENGTH, batch_size=8, micro_batch_size=2, lr=1e-3, log_every=3, checkpoint_every=1
)
PRUNE = PruneSection(sparsity=0.7, initial_sparsity=0.2, start_after=3, finetune=5, interval=3)


def prune_by(method: str) -> PruneSection:
    return PRUNE.model_copy(update={"method": METHOD_CONFIGS[method](name=method)})


def run(
    case: str,
    bert: Path,
    data: Path,
    output: Path,
    checkpoints: Any,
    *,
    task: Any = CLASSIFICATION,
    config: TrainConfig = TRAIN,
    prune: PruneSection = PRUNE,
    teacher: TeacherSpec | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
    is_to_stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    context = Context(
        inputs={"data": data},
        model_kwargs={"num_labels": 2} if task is CLASSIFICATION else {"num_labels": 1},
        output=output,
        workers=WorkerGroup.current(),
        checkpoints=checkpoints,
        progress=progress,
        is_to_stop=is_to_stop,
    )
    return train(
        context,
        model_config=ModelConfig(path=str(bert)),
        task=make_task(task),
        config=config,
        zero=ZeroConfig(**{"precision": "fp32", **LAYOUTS[case]}, bucket_elements=10_000),
        prune=prune,
        teacher=teacher,
    )


def main(bert: str, data: str, output: str) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda _: True  # slow on most CPUs, but it computes
    dist.init_process_group("gloo")
    load_tokenizer(ModelConfig(path=bert))
    paths = Path(bert), Path(data), Path(output)
    nan_paths = paths[0], paths[1].with_name("nan-data"), paths[2]
    run_cases(
        paths[2],
        {
            **{case: partial(run_interrupted, case, *paths) for case in CASES},
            **{f"distilled-{case}": partial(run_distilled, case, *paths) for case in DISTILLED},
            "asked": partial(run_asked_to_stop, *paths),
            "counted": partial(run_counted, *paths),
            "silent": partial(run_with_silent_teacher, *paths),
            "damaged": partial(run_from_damage, *paths),
            **{f"{case}-nan": partial(run_with_nan, case, *nan_paths) for case in NAN_CASES},
            **{f"overflow-{n}": partial(run_that_overflows, n, *paths) for n in OVERFLOWS},
            "uncompiled": check_that_no_compiler_was_imported,
        },
        seconds=200,
    )


def check_that_no_compiler_was_imported() -> None:
    """After all of the training above."""
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
    assert "torch._inductor.compile_fx" not in sys.modules
    assert "TORCHDYNAMO_DISABLE" not in os.environ


def run_interrupted(case: str, bert: Path, data: Path, output: Path) -> None:
    """Train whole, and stopped at several steps and resumed."""
    prune = prune_by(METHOD_OF.get(case, "mgpp"))
    for stop in (None, *STOP_AFTER):
        writing = "foreground" if stop == STOP_AFTER[1] else "background"
        config = TRAIN.model_copy(
            update={"group_by_length": case == GROUPED, "checkpoint_writing": writing}
        )
        folder = output / f"{case}-{stop}"
        checkpoints = StoppingCheckpoints(f"{folder}-checkpoints", WorkerGroup.current())
        checkpoints.stop_at = stop
        if stop is not None:
            try:
                run(case, bert, data, folder, checkpoints, prune=prune, config=config)
            except InterruptedRunError:
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(folder)
                dist.barrier()
            checkpoints.stop_at = None
        figures = run(case, bert, data, folder, checkpoints, prune=prune, config=config)
        if dist.get_rank() == 0:
            (folder / "figures.json").write_text(json.dumps(figures))


def run_asked_to_stop(bert: Path, data: Path, output: Path) -> None:
    """Train until one rank alone is asked to stop, between two checkpoints; then to the end.

    A last time it is asked before the first step, and where no checkpoint is wanted.
    """
    prune, folder = prune_by(METHOD_OF[ASKED]), output / "asked"
    train_on = partial(run, ASKED, bert, data, folder)
    seldom = TRAIN.model_copy(update={"checkpoint_every": 5})
    checkpoints = CheckpointStore(f"{folder}-checkpoints", WorkerGroup.current(), keep=3)
    rank, asked, told = dist.get_rank(), 0, []

    def is_to_stop() -> bool:
        nonlocal asked
        asked += 1  # once before the first step, and once a step
        return rank == 1 and asked == ASKED_AT + 1

    def end(config: TrainConfig, is_to_stop: Callable[[], bool]) -> None:
        try:
            train_on(checkpoints, prune=prune, config=config, is_to_stop=is_to_stop)
        except RunStoppedError as stopped:
            told.append(str(stopped))
        dist.barrier()

    end(seldom, is_to_stop)
    told.append(checkpoints.restore(lambda saved: saved.manifest.step))
    end(seldom, lambda: True)
    figures = train_on(checkpoints, prune=prune, config=seldom)
    if rank == 0:
        checkpoints.discard()
    dist.barrier()
    end(TRAIN.model_copy(update={"checkpoint_every": 0}), lambda: rank == 0)
    told.append(checkpoints.restore(lambda saved: saved.manifest.step))
    (output / f"asked-{rank}.json").write_text(json.dumps([told, figures]))


def run_counted(bert: Path, data: Path, output: Path) -> None:
    """Count the collectives of a step, and of one whose weights take none."""
    counts: list[int] = []
    take_step, weigh = loop.train_step, loop.weigh

    def without(task: Any, micro_batches: Any, workers: Any, *, flag: bool) -> Any:
        return [WHOLE] * len(micro_batches), lambda: False

    def counted(*arguments: Any) -> Any:
        if len(counts) == 3:
            return take_step(*arguments)
        loop.weigh = weigh if len(counts) < 2 else without
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            taken = take_step(*arguments)
        of_c10d = (e.count for e in seen.key_averages() if e.key.startswith("c10d::"))
        counts.append(sum(of_c10d))
        return taken

    loop.train_step = counted
    try:
        plain = TRAIN.model_copy(update={"log_every": 100, "checkpoint_every": 0})
        checkpoints = CheckpointStore(f"{output}/counted-checkpoints", WorkerGroup.current())
        run("stage2", bert, data, output / "counted", checkpoints, config=plain)
    finally:
        loop.train_step, loop.weigh = take_step, weigh
    if dist.get_rank() == 0:
        (output / "counted.json").write_text(json.dumps(counts))


def teacher_of(output: Path) -> TeacherSpec:
    """The model that was trained first, whole."""
    return TeacherSpec(
        config=DistillConfig(temperature=3.0, hidden_weight=0.5),
        model=ModelConfig(path=str(output / f"{TEACHER}-None" / "model")),
    )


def run_distilled(case: str, bert: Path, data: Path, output: Path) -> None:
    """Learn from a model that was trained before; for the last case also stopped and resumed."""
    teacher = teacher_of(output)
    often = TRAIN.model_copy(update={"log_every": 1})
    for stop in (None, DISTILL_STOP) if case == DISTILLED[-1] else (None,):
        folder = output / f"distilled-{case}-{stop}"
        checkpoints = StoppingCheckpoints(f"{folder}-checkpoints", WorkerGroup.current())
        checkpoints.stop_at = stop
        if stop is not None:
            with suppress(InterruptedRunError):
                run(case, bert, data, folder, checkpoints, config=often, teacher=teacher)
            dist.barrier()
            checkpoints.stop_at = None
        run(case, bert, data, folder, checkpoints, config=often, teacher=teacher)


def run_with_silent_teacher(bert: Path, data: Path, output: Path) -> None:
    """Train without a teacher and with one of next to no weight.

    In one case: DeepSpeed's ZeRO 3 leaves the process with another torch.nn.functional.linear, which
    rounds otherwise than the one the first cases ran with.
    """
    silent = TeacherSpec(config=DistillConfig(weight=2e-38), model=teacher_of(output).model)
    for name, teacher in (("undistilled", None), ("silent", silent)):
        checkpoints = StoppingCheckpoints(f"{output / name}-checkpoints", WorkerGroup.current())
        run("stage2", bert, data, output / name, checkpoints, teacher=teacher)
    dist.barrier()


def run_from_damage(bert: Path, data: Path, output: Path) -> None:
    """Stop, damage one rank's shards in every checkpoint that there is, and run again.

    The first time one rank's node has no memory for a copy, the second time all have.
    """
    folder, prune = output / "damaged", prune_by(METHOD_OF[DAMAGED])
    notes: list[str] = []
    checkpoints = StoppingCheckpoints(
        f"{folder}-checkpoints", WorkerGroup.current(), notify=notes.append
    )
    checkpoints.stop_at = STOP_AFTER[1]
    measure = host_memory.available_bytes
    if dist.get_rank() == 1:
        host_memory.available_bytes = lambda: 1000  # too few for a copy
    with suppress(InterruptedRunError):
        run(DAMAGED, bert, data, folder, checkpoints, prune=prune)
    host_memory.available_bytes = measure
    dist.barrier()
    if dist.get_rank() == 0:
        for shards in Path(f"{folder}-checkpoints").rglob("state-r00001-*"):
            content = bytearray(shards.read_bytes())
            content[len(content) // 2] ^= 1
            shards.write_bytes(content)
    dist.barrier()
    checkpoints.stop_at = None
    run(DAMAGED, bert, data, folder, checkpoints, prune=prune)
    if dist.get_rank() == 0:
        (folder / "notes.json").write_text(json.dumps(notes))


def run_with_nan(case: str, bert: Path, data: Path, output: Path) -> None:
    """Train on rows one of which has no number for its label: once stopped by it, once not."""
    name = f"{case}-nan"
    checkpoints = CheckpointStore(f"{output / name}-checkpoints", WorkerGroup.current(), keep=3)
    found: dict[str, Any] = {}
    try:
        run(case, bert, data, output / name, checkpoints, task=REGRESSION)
    except StageError as error:
        found["error"] = str(error)
    found["last_checkpoint"] = checkpoints.restore(lambda saved: saved.manifest.step)
    patient = TRAIN.model_copy(update={"max_skipped_steps": 9})
    found["figures"] = run(
        case, bert, data, output / name, checkpoints, task=REGRESSION, config=patient
    )
    if dist.get_rank() == 0:
        (output / name / "found.json").write_text(json.dumps(found))


def run_that_overflows(name: str, bert: Path, data: Path, output: Path) -> None:
    """Train in fp16 with a loss scale that no gradient survives."""
    case = f"overflow-{name}"
    checkpoints = CheckpointStore(f"{output / case}-checkpoints", WorkerGroup.current())
    try:
        run(case, bert, data, output / case, checkpoints)
    except StageError as error:
        if dist.get_rank() == 0:
            (output / case / "error.txt").write_text(str(error))
    dist.barrier()
