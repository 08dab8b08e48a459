"""The training stage: a fine-tune under DeepSpeed, dense or pruned as it goes.

A plain function over a process group that is already there; it runs the same under Ray and torchrun.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from mgpp import Pruner, PruningSchedule, transposed_weights
from mgpp.backends.deepspeed import attach, clear_gradients, training_state
from pipeline.context import Context, never
from pipeline.errors import ConfigError, Problem, RunStoppedError, StageError
from pipeline.host_memory import room_on_nodes
from pipeline.models.loading import load_tokenizer
from pipeline.models.settings import load_model_config
from pipeline.models.source import ModelConfig
from pipeline.models.trial import predicts_next_token
from pipeline.pruning.config import PruneSection
from pipeline.saving.contents import contents_of
from pipeline.saving.model_files import write_model
from pipeline.store.checkpoints import CheckpointStore, SavedCheckpoint
from pipeline.tasks import Task
from pipeline.tasks.base import token_lengths, without_labels
from pipeline.tracking.recorder import Recorder
from pipeline.training import checkpoint
from pipeline.training.batch_mean import (
    Weights,
    num_attended,
    weigh,
    weighted_loss,
    with_a_target,
)
from pipeline.training.batches import BatchPlan, DrawnRows, loaded
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig, init_deepspeed
from pipeline.training.engine import make_engine
from pipeline.training.teacher import Distillation, TeacherSpec
from pipeline.worker_group import WorkerGroup

_NUM_LAYER_RECORDS = 20
_MAX_OVERFLOWS = 60  # looking for a loss scale takes DeepSpeed 32 halvings and a few more at most
_NOT_FINITE_ADVICE = (
    "Look for values that are not finite in the data, lower train.lr, set train.gradient_clipping or "
    "train.lr_warmup_length, or use bf16 or fp32 instead of fp16; the last checkpoint is good"
)


@dataclass(kw_only=True)
class _Run:
    """One run at work: what the loop's functions share.

    Schedules go by the updates that were made (`done.steps`), batches by those that were drawn
    (`done.batches`). There are more of these where DeepSpeed left updates out: it does so in fp16 as it
    looks for a loss scale, and in every precision where a gradient is not finite.
    """

    config: TrainConfig
    task: Task
    zero: ZeroConfig
    workers: WorkerGroup
    engine: Any
    pruner: Pruner | None
    distillation: Distillation | None
    recorder: Recorder | None
    plan: BatchPlan
    own_loss: bool
    num_steps: int
    warmup_steps: int
    done: checkpoint.TrainingState
    window: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    window_start: float = field(default_factory=time.perf_counter)
    steps_in_window: int = 0
    is_to_stop: Callable[[], bool] = never
    saved_at: int = 0  # steps that the newest checkpoint has
    overflows: int = 0  # steps left out one after another
    copies_fit: bool | None = None  # whether nodes have room for a checkpoint's copy, once asked


def train(
    context: Context,
    *,
    model_config: ModelConfig,
    task: Task,
    config: TrainConfig,
    zero: ZeroConfig,
    prune: PruneSection | None,
    teacher: TeacherSpec | None = None,
) -> dict[str, Any]:
    """Fine-tune and, with `prune`, prune; write the model and its records to the context's output.

    Args:
        context: what it reads, where it writes and the workers, all of which call this function.
        model_config: the pretrained model.
        task: what it is fine-tuned on.
        config: how.
        zero: how state is sharded.
        prune: the method and its schedule; None fine-tunes the dense model.
        teacher: which model teaches, and the weights of its losses; None for none.

    Returns:
        The run's figures, on every worker.

    Raises:
        RunStoppedError: if it was asked to stop, once the steps so far are saved.
    """
    workers = context.workers
    init_deepspeed(workers.backend)
    rows = context.rows()["train"]
    lengths = token_lengths(rows) if config.group_by_length else None
    plan = config.batch_plan(num_rows=len(rows), world_size=workers.world_size, lengths=lengths)
    num_steps = config.num_steps(plan.steps_per_epoch)
    own_loss = uses_own_loss(model_config, task)
    engine, pruner, done, history = _begin_or_resume(
        context,
        partial(make_engine, context, model_config, task, config, zero, prune, plan),
        partial(
            attach_pruner,
            prune=prune,
            schedule=prune.settings.schedule(num_steps, plan.steps_per_epoch),
            num_examples=plan.num_rows,
        )
        if prune
        else None,
    )
    contents_of(engine.module)  # what could not be saved is refused before the first step
    distillation = None
    if teacher is not None:
        distillation = teacher.begin(
            engine.module, task, zero, plan.micro_batch_size, workers, own_loss=own_loss
        )
    run = _Run(
        config=config,
        task=task,
        zero=zero,
        workers=workers,
        engine=engine,
        pruner=pruner,
        distillation=distillation,
        recorder=Recorder(context.output, context.progress, history) if workers.is_main else None,
        plan=plan,
        own_loss=own_loss,
        num_steps=num_steps,
        warmup_steps=config.lr_warmup_length.steps(
            steps_per_epoch=plan.steps_per_epoch, num_steps=num_steps
        ),
        done=done,
        is_to_stop=context.is_to_stop,
        saved_at=done.steps,
    )
    _take_steps(run, _micro_batches(run, context, rows), context.checkpoints)
    figures = _finish(run, context)
    if run.recorder:
        run.recorder.close()
    engine.destroy()  # the next stage of this worker group needs the memory
    if distillation is not None:
        distillation.close()
    return figures


def uses_own_loss(model: ModelConfig, task: Task) -> bool:
    """Tell whether the loss is what the model makes of labels; otherwise it is made of its logits."""
    if task.auto_model != "AutoModelForCausalLM":
        return True
    predicts = predicts_next_token(
        load_model_config(model), task.auto_model, trust_remote_code=model.trust_remote_code
    )
    return predicts is not False


def _micro_batches(run: _Run, context: Context, rows: Any) -> Iterator[dict[str, Tensor]]:
    """Return this worker's micro-batches from the first that is to come, without end."""
    tokenizer = load_tokenizer(ModelConfig(path=str(context.data / "tokenizer")))
    draws, rank, first_step = run.task.draws_inputs, run.workers.rank, run.done.batches
    return loaded(
        DrawnRows(rows) if draws else rows,
        run.plan.drawn_micro_batches(rank, first_step)
        if draws
        else run.plan.micro_batches(rank, first_step),
        run.task.collator(tokenizer),
        run.workers.device,
    )


def _begin_or_resume(
    context: Context,
    make: Callable[[], Any],
    attach_to: Callable[[Any], Pruner] | None,
) -> tuple[Any, Pruner | None, checkpoint.TrainingState, str]:
    """Make the engine and the pruner, and load the newest good checkpoint, if there is one.

    Args:
        context: the workers and the checkpoints.
        make: makes the engine.
        attach_to: attaches the pruner to it, if there is to be one.

    Returns:
        The engine, the pruner, how far the run had come, and its records so far.
    """
    engine = make()
    pruner = attach_to(engine) if attach_to else None
    was_read = False

    def read(saved: SavedCheckpoint) -> checkpoint.Restored:
        nonlocal was_read
        was_read = True
        return checkpoint.read(saved, engine=engine, pruner=pruner, workers=context.workers)

    restored = context.checkpoints.restore(read)
    if restored is not None:
        restored.apply(engine=engine, pruner=pruner)
        return engine, pruner, restored.done, restored.records
    if was_read:  # damage was found in what the engine holds by now
        engine.destroy()
        engine = make()
        pruner = attach_to(engine) if attach_to else None
    return engine, pruner, checkpoint.TrainingState(), ""


def _take_steps(
    run: _Run, batches: Iterator[dict[str, Tensor]], checkpoints: CheckpointStore
) -> None:
    """Train to the end, with a checkpoint now and then."""
    every = run.config.checkpoint_every
    try:
        if run.workers.sum(run.is_to_stop())[0]:
            _stop(run, checkpoints)
        while run.done.steps < run.num_steps:
            updated, is_to_stop = train_step(run, batches)
            checkpoints.check()
            steps = run.done.steps
            if is_to_stop and steps < run.num_steps:
                _stop(run, checkpoints)
            if updated and every and steps % every == 0 and steps < run.num_steps:
                _save(run, checkpoints)
        checkpoints.settle()
    except (StageError, RunStoppedError):
        # The same on all workers: what they write is of an earlier step, and good.
        with suppress(Exception):
            checkpoints.settle()
        raise
    except BaseException:
        checkpoints.abandon()
        raise


def _stop(run: _Run, checkpoints: CheckpointStore) -> NoReturn:
    """Save the steps since the newest checkpoint, if any are to be kept, and end the work.

    Raises:
        RunStoppedError: in the end.
    """
    if run.config.checkpoint_every and run.done.steps > run.saved_at:
        _save(run, checkpoints, at_once=True)
    checkpoints.settle()
    raise RunStoppedError(f"saved at step {run.saved_at}" if run.saved_at else "no step is saved")


def _save(run: _Run, checkpoints: CheckpointStore, *, at_once: bool = False) -> None:
    """Save the state: from a copy in the background where that is wanted and nodes have room for it.

    Raises:
        StageError: if weights are not finite, or storage does not take it.
    """
    _check_weights(run)
    checkpoints.settle()  # its copy is gone before the next is made
    snapshot = checkpoint.Snapshot(
        engine=run.engine,
        pruner=run.pruner,
        records=run.recorder.path if run.recorder else None,
        done=run.done,
        workers=run.workers,
    )
    in_background = not at_once and _is_copied(run, checkpoints, snapshot.num_bytes)
    if in_background:
        snapshot.copy_to_host()
    checkpoints.save(snapshot.write, run.done.steps, in_background=in_background)
    run.saved_at = run.done.steps


def _is_copied(run: _Run, checkpoints: CheckpointStore, num_bytes: int) -> bool:
    """Decide whether a checkpoint is copied and written in the background; the same on all workers."""
    writing = run.config.checkpoint_writing
    if writing != "auto":
        return writing == "background"
    room = room_on_nodes(num_bytes, run.workers)
    if room.fits != run.copies_fit:
        run.copies_fit = room.fits
        how = "background" if room.fits else "foreground"
        checkpoints.note(f"checkpoints are written in the {how}: a copy takes {room}")
    return room.fits


def attach_pruner(
    engine: Any, prune: PruneSection, schedule: PruningSchedule, num_examples: int
) -> Pruner:
    """Prune the engine's weights as the settings say.

    Raises:
        ConfigError: if this engine or these weights cannot be pruned so.
    """
    weights = dict(engine.module.named_parameters())
    names = prune.settings.select(engine.module)
    prunable = {name: weights[name] for name in names}
    method = prune.settings.build_method(num_examples)
    try:
        pruner = attach(
            engine,
            prunable,
            method=method,
            schedule=schedule,
            placement=prune.settings.placement(),
            transposed=transposed_weights(engine.module),
            keep_zeros=prune.settings.keep_zeros,
        )
    except ValueError as error:
        raise _of_pruning(str(error)) from error
    if pruner.misfit:  # the engine holds the start model, also where a checkpoint is loaded next
        raise _of_pruning(pruner.misfit)
    return pruner


def _of_pruning(why: str) -> ConfigError:
    reason = why.removeprefix("keep_zeros: ")
    key = "prune.method" if reason == why else "prune.keep_zeros"
    return ConfigError([Problem(key, reason)])


def train_step(run: _Run, batches: Iterator[dict[str, Tensor]]) -> tuple[bool, bool]:
    """Take one optimizer step: set the rate, forward and backward each micro-batch, record.

    Returns:
        Whether the weights were updated; whether any worker was asked to stop before the step.
    """
    step = run.done.steps
    for group in run.engine.basic_optimizer.param_groups:
        group["lr"] = run.config.lr_at(step, run.num_steps, run.warmup_steps)
    # Dropout is drawn from (seed, batch, rank), so that a resumed run draws what it would have drawn.
    # Modulo 2^64, which torch takes; odd factors keep different seeds different.
    drawn = (run.config.seed * 1_000_003 + run.done.batches) * 65_537 + run.workers.rank
    torch.manual_seed(drawn % 2**64)
    skipped = run.engine.skipped_steps
    clear_gradients(run.engine)
    micro_batches = [next(batches) for _ in range(run.plan.accumulation)]
    all_weights, any_is_to_stop = weigh(run.task, micro_batches, run.workers, flag=run.is_to_stop())
    for batch, weights in zip(micro_batches, all_weights, strict=True):
        forward_backward(run, batch, weights)
        _step(run)
    is_to_stop = any_is_to_stop()
    run.done.batches += 1
    if run.engine.skipped_steps > skipped:
        _skip(run)
        return False, is_to_stop
    run.overflows = 0
    run.done.steps += 1
    run.steps_in_window += 1
    if run.done.steps % run.config.log_every == 0 or run.done.steps == run.num_steps:
        _record_step(run, step)
    last = run.pruner.last_pruning if run.pruner else None
    if (
        run.pruner and last and max(last.step, 0) == step
    ):  # also a mask that was there before step 0
        _record_pruning(run, run.pruner, step)
    return True, is_to_stop


def _step(run: _Run) -> None:
    """Let DeepSpeed step, if it is not accumulating yet.

    Raises:
        StageError: if fp16 overflows at the smallest loss scale.
    """
    try:
        run.engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise StageError(
            f"fp16 overflows in step {run.done.steps} at the smallest loss scale. {_NOT_FINITE_ADVICE}"
        ) from error


def _skip(run: _Run) -> None:
    """Note an update that DeepSpeed left out; it found the same on all workers.

    Raises:
        StageError: if those were too many. The weights are still good.
    """
    run.window.clear()  # its loss may not be finite
    run.window_start, run.steps_in_window = time.perf_counter(), 0
    if run.zero.precision == "fp16":
        run.overflows += 1
        if run.overflows > _MAX_OVERFLOWS:
            raise StageError(
                f"fp16 overflowed in {run.overflows} batches one after another, at a loss scale of "
                f"{run.engine.optimizer.cur_scale:g} in the end: step {run.done.steps} cannot be taken. "
                f"{_NOT_FINITE_ADVICE}"
            )
        return
    run.done.skipped += 1
    if run.recorder:
        run.recorder.write("skip", run.done.steps, {"batch": run.done.batches - 1})
    if run.done.skipped > run.config.max_skipped_steps:
        raise StageError(
            f"the gradient of step {run.done.steps} is not finite (batch {run.done.batches - 1}); with "
            f"it {run.done.skipped} were left out, and train.max_skipped_steps is "
            f"{run.config.max_skipped_steps}. {_NOT_FINITE_ADVICE}"
        )


def _check_weights(run: _Run) -> None:
    """Make sure that no checkpoint is written of weights that are not finite.

    Raises:
        StageError: if there are any, on whatever worker.
    """
    # Shard by shard, for ZeRO 3 pads parameters with whatever was in memory.
    masters = (shard.values["master"] for shard in training_state(run.engine))
    bad = sum(not bool(torch.isfinite(master).all()) for master in masters)
    if run.workers.sum(bad)[0]:
        raise StageError(
            f"weights are not finite after step {run.done.steps}. {_NOT_FINITE_ADVICE}"
        )


def forward_backward(run: _Run, batch: dict[str, Tensor], weights: Weights) -> None:
    """Run one micro-batch; its losses and tokens are added to the record under way."""
    run.window["tokens"] += num_attended(batch)
    batch = with_a_target(run.task, batch)
    on_device = {name: t.to(run.workers.device, non_blocking=True) for name, t in batch.items()}
    losses = _losses(run, on_device, weights)
    run.engine.backward(losses["loss"])
    for name, loss in losses.items():
        run.window[name] += loss.detach().float() / run.plan.accumulation


def _losses(run: _Run, batch: dict[str, Tensor], weights: Weights) -> dict[str, Any]:
    if run.distillation is not None:
        return dict(run.distillation.losses(run.engine, batch, weights))
    outputs = run.engine(**(batch if run.own_loss else without_labels(batch)))
    return {"loss": weighted_loss(outputs, batch, run.task, weights.targets)}


def _record_step(run: _Run, step: int) -> None:
    sums = run.workers.sum(*(float(value) for value in run.window.values()))
    losses = dict(zip(run.window, sums, strict=True))
    tokens = losses.pop("tokens")
    losses = {n: s / (run.workers.world_size * run.steps_in_window) for n, s in losses.items()}
    if not math.isfinite(losses["loss"]):
        raise StageError(f"the loss is {losses['loss']} at step {step}. {_NOT_FINITE_ADVICE}")
    now = time.perf_counter()
    norm = run.engine.get_global_grad_norm()
    values: dict[str, Any] = {
        "num_steps": run.num_steps,
        "epoch": (step + 1) / run.plan.steps_per_epoch,
        **losses,
        "lr": run.engine.basic_optimizer.param_groups[0]["lr"],
        "tokens_per_second": tokens / (now - run.window_start),
        "step_seconds": (now - run.window_start) / run.steps_in_window,
        "grad_norm": float(norm) if norm is not None else None,
    }
    if run.pruner:
        values["phase"] = run.pruner.schedule.phase(step)
        values["mask_sparsity"] = run.pruner.mask_sparsity
        last = run.pruner.last_pruning
        values["threshold"] = last.threshold if last else None
        values |= run.pruner.method.log_values(step, run.pruner.schedule)
    if run.recorder:
        run.recorder.write("step", step, values)
    run.window.clear()
    run.window_start, run.steps_in_window = now, 0


def _record_pruning(run: _Run, pruner: Pruner, step: int) -> None:
    """Record a pruning; sums over the workers, so all of them call."""
    values = {k: v for k, v in vars(pruner.last_pruning).items() if k != "step"}
    threshold = pruner.method.log_values(step, pruner.schedule).get("spike_threshold")
    if threshold is not None:
        values["spike_share"] = pruner.spike_share(threshold)
    schedule = pruner.schedule
    every = max((schedule.prune_end - schedule.prune_start) // _NUM_LAYER_RECORDS, 1)
    since_start = step - schedule.prune_start
    layers = None
    if step == schedule.prune_end or since_start % every < schedule.interval:
        layers = pruner.sparsity_by_weight()
    if run.recorder:
        run.recorder.write("prune", step, values)
        if layers:
            run.recorder.write("layers", step, {"sparsity": layers})


def _finish(run: _Run, context: Context) -> dict[str, Any]:
    """Write the trained model with its tokenizer and fingerprints; return the run's figures."""
    figures: dict[str, Any] = {"num_steps": run.num_steps}
    pruner = run.pruner
    if pruner is not None:
        figures |= {
            "num_prunable": pruner.num_prunable,
            "num_zeros": pruner.num_zeros(),
            "prune_start": pruner.schedule.prune_start,
            "prune_end": pruner.schedule.prune_end,
            **{
                k: v
                for k, v in vars(pruner.last_pruning).items()
                if k in ("num_pruned", "sparsity", "threshold", "mask_hash")
            },
        }
        if figures["num_zeros"] < figures["num_pruned"]:
            raise StageError(
                f"{figures['num_pruned']} weights were pruned but only {figures['num_zeros']} are "
                "zero: the mask was not kept"
            )
    model = run.engine.module
    figures["num_parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    tokenizer = load_tokenizer(ModelConfig(path=str(context.data / "tokenizer")))
    figures["export_bytes"] = write_model(
        context, model, tokenizer=tokenizer, prunable=pruner.names if pruner else ()
    )
    return figures
