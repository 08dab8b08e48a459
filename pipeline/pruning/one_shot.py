"""The pruning stage of one-shot methods: a decoder, layer by layer, on what text sends through it.

Each worker holds the model on its CPU and one layer at a time on its device. Rows are split among
the workers, and so are the matrices of a layer; statistics are summed over all. Each layer is pruned on
the outputs of the pruned layers before it. A plain function; it runs the same under Ray and torchrun.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from safetensors.torch import load
from torch import Tensor, nn

from mgpp import OneShotMethod
from mgpp.methods.one_shot.base import portions
from mgpp.tensor_file import write_tensors
from pipeline.context import Context
from pipeline.errors import ConfigError, Problem, RunStoppedError, StageError
from pipeline.models.decoder import (
    DecoderLayer,
    LayerCall,
    find_layers,
    layer_inputs,
    run_layer,
)
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import PruneSection
from pipeline.pruning.layer import LayerPruner, MatrixFigures
from pipeline.saving.model_files import write_model
from pipeline.store.checkpoints import CheckpointFiles, CheckpointStore
from pipeline.tasks import Task
from pipeline.tracking.recorder import Recorder
from pipeline.worker_group import WorkerGroup

_TENSORS_FILE, _FIGURES_FILE = "layer.safetensors", "layer.json"


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run at work: what its functions share; `names` are the prunable weights, in order."""

    workers: WorkerGroup
    model: Any
    layers: list[DecoderLayer]
    names: list[str]
    pruner: LayerPruner
    checkpoints: CheckpointStore

    @property
    def num_prunable(self) -> int:
        return sum(self.model.get_parameter(name).numel() for name in self.names)


def prune_one_shot(
    context: Context,
    *,
    model_config: ModelConfig,
    task: Task,
    prune: PruneSection,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Any]:
    """Prune the model once; write it and the records to the context's output, as training does.

    What is done is kept layer by layer: a run that was killed takes the layers that were pruned, runs the
    rows through them again and continues, on any number of workers.

    Args:
        context: what it reads, where it writes and the workers, all of which call this function.
        model_config: the model.
        task: causal language modelling.
        prune: the method, how far, and the number of calibration rows.
        dtype: of the model; statistics are summed in float64, matrices pruned in float32.
        seed: draws the rows, and the weights of a model without any.

    Returns:
        The run's figures, on every worker.

    Raises:
        ConfigError: if the model, the method and the rows do not go together.
        StageError: if the inputs of a matrix do not allow its pruning.
        RunStoppedError: if it was asked to stop, once a layer is saved.
    """
    workers = context.workers
    rows = calibration_rows(context.data, prune.calibration_rows, seed)
    model = load_model(
        model_config,
        task.auto_model,
        model_kwargs=context.model_kwargs,
        dtype=dtype,
        seed=seed,
        new_head=False,
        workers=workers,
    ).eval()
    try:
        run = _begin(context, model, task, prune)
        mine = rows[workers.rank :: workers.world_size]
        hidden, calls = layer_inputs(model, run.layers, mine or rows[:1])
    except ValueError as error:
        raise ConfigError([Problem("prune.method", f"{prune.method.name}: {error}")]) from error
    recorder = Recorder(context.output, context.progress) if workers.is_main else None
    figures = _prune_layers(run, hidden[: len(mine)], calls, recorder, context)
    result = _figures(run, figures)
    if recorder:
        recorder.write("layers", len(run.layers) - 1, {"sparsity": _shares(run, figures)})
        recorder.close()
    tokenizer = load_tokenizer(ModelConfig(path=str(context.data / "tokenizer")))
    result["export_bytes"] = write_model(context, model, tokenizer=tokenizer, prunable=run.names)
    return result


def calibration_rows(data: Path, num_rows: int, seed: int) -> list[Tensor]:
    """Return tokens of training blocks drawn by `seed`, each 1-D int64.

    Raises:
        ConfigError: if there are not as many.
    """
    blocks = load_from_disk(str(data / "dataset"))["train"]
    problems = calibration_problems(num_rows, len(blocks))
    if problems:
        raise ConfigError(problems)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    chosen = blocks.select(order[:num_rows].tolist())
    return [torch.tensor(ids, dtype=torch.int64) for ids in chosen["input_ids"]]


def calibration_problems(num_rows: int, num_blocks: int) -> list[Problem]:
    """Return what is wrong with the number of calibration rows, given the blocks there are."""
    if num_rows <= num_blocks:
        return []
    return [
        Problem(
            "prune.calibration_rows",
            f"there are {num_blocks} training blocks",
            got=num_rows,
            hint="ask for fewer, or give more text or a smaller task.max_length",
        )
    ]


def prunable_layers(
    model: nn.Module, task: Task, names: Sequence[str], method: OneShotMethod
) -> list[DecoderLayer]:
    """Return the decoder's layers and what is pruned of each; the model may be on the meta device.

    Raises:
        ValueError: if the method does not go with the task, the model or the weights.
    """
    if task.auto_model != "AutoModelForCausalLM":
        raise ValueError(
            "only causal language models (task.type: causal-lm) are pruned in one shot"
        )
    layers = find_layers(model, names)
    for layer in layers:
        for name, matrix in layer.matrices.items():
            try:
                method.check_shape(matrix.rows().shape[1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return layers


def _begin(context: Context, model: nn.Module, task: Task, prune: PruneSection) -> _Run:
    settings = prune.settings
    method = settings.one_shot
    assert method is not None
    assert settings.sparsity is not None
    names = settings.select(model)
    layers = prunable_layers(model, task, names, method)
    sizes = {name: m.stored().numel() for layer in layers for name, m in layer.matrices.items()}
    counts = portions(method.count(sum(sizes.values()), settings.sparsity), list(sizes.values()))
    starts = accumulate(sizes.values(), initial=0)
    return _Run(
        workers=context.workers,
        model=model,
        layers=layers,
        names=names,
        pruner=LayerPruner(
            method=method,
            workers=context.workers,
            counts=dict(zip(sizes, counts, strict=True)),
            starts=dict(zip(sizes, starts, strict=False)),
        ),
        checkpoints=context.checkpoints,
    )


@torch.no_grad()
def _prune_layers(
    run: _Run,
    hidden: list[Tensor],
    calls: list[LayerCall],
    recorder: Recorder | None,
    context: Context,
) -> dict[str, MatrixFigures]:
    """Prune layer after layer; `hidden` are the inputs of this worker's rows to the first.

    Raises:
        RunStoppedError: after a layer that is saved, if the work was asked to stop.
    """
    figures: dict[str, MatrixFigures] = {}
    device, last = run.workers.device, len(run.layers) - 1
    resuming = True
    for index, layer in enumerate(run.layers):
        began = time.monotonic()
        store = run.checkpoints.part(f"layer-{index:05d}")
        saved = _load_layer(store, layer) if resuming else None
        resuming = saved is not None
        call = calls[index].to(device)
        layer.module.to(device)
        found = run.pruner.prune(layer, call, hidden) if saved is None else saved
        figures |= found
        if index < last:
            for i, states in enumerate(hidden):
                hidden[i] = run_layer(layer.module, call, states.to(device)).cpu()
        layer.module.to("cpu")
        if saved is None:
            _save_layer(run.workers, store, layer, found, index)
        values = _values(run, figures, found)
        if recorder:
            recorder.write("prune", index, values)
        position = {"event": "layer", "step": index, "num_steps": last + 1}
        context.progress({**position, **values, "step_seconds": time.monotonic() - began})
        if run.workers.sum(context.is_to_stop())[0] and index < last:
            raise RunStoppedError(f"saved {index + 1} of {last + 1} layers")
    return figures


def _values(
    run: _Run, figures: dict[str, MatrixFigures], newest: dict[str, MatrixFigures]
) -> dict[str, Any]:
    """Return a layer's record: all that was pruned so far, and the layer's own largest score."""
    num_pruned = sum(one.num_pruned for one in figures.values())
    mask_hash = sum(one.mask_hash for one in figures.values())
    return {
        "num_pruned": num_pruned,
        "sparsity": num_pruned / run.num_prunable,
        "threshold": max((one.threshold for one in newest.values()), default=0.0),
        "mask_hash": f"{mask_hash & 0xFFFFFFFFFFFFFFFF:016x}",
    }


def _shares(run: _Run, figures: dict[str, MatrixFigures]) -> dict[str, float]:
    """Return the share pruned of each weight, by name."""
    pruned = dict.fromkeys(run.names, 0)
    for layer in run.layers:
        for name, matrix in layer.matrices.items():
            pruned[matrix.weight] += figures[name].num_pruned
    return {n: count / run.model.get_parameter(n).numel() for n, count in pruned.items()}


def _warnings(figures: dict[str, MatrixFigures]) -> list[str]:
    """Tell of matrices that were pruned on fewer tokens than they have inputs."""
    few = {name: one for name, one in figures.items() if one.num_tokens < one.num_inputs}
    if not few:
        return []
    least = min(few, key=lambda name: few[name].num_tokens)
    return [
        f"{len(few)} of {len(figures)} matrices were pruned on fewer tokens than they have inputs, the "
        f"fewest {least} on {few[least].num_tokens} for {few[least].num_inputs}; give more rows "
        "(prune.calibration_rows)"
    ]


def _figures(run: _Run, figures: dict[str, MatrixFigures]) -> dict[str, Any]:
    """Return the run's figures, in which a run that trains nothing has no steps."""
    values = _values(run, figures, figures)
    num_zeros = sum(int((run.model.get_parameter(name) == 0).sum()) for name in run.names)
    if num_zeros < values["num_pruned"]:
        raise StageError(
            f"{values['num_pruned']} weights were pruned but only {num_zeros} are zero: the masks were "
            "not kept"
        )
    return {
        **values,
        "num_prunable": run.num_prunable,
        "num_zeros": num_zeros,
        "num_parameters": sum(p.numel() for p in run.model.parameters()),
        "num_steps": 0,
        "prune_start": 0,
        "prune_end": 0,
        "warnings": _warnings(figures),
    }


def _save_layer(
    workers: WorkerGroup,
    store: CheckpointStore,
    layer: DecoderLayer,
    figures: dict[str, MatrixFigures],
    index: int,
) -> None:
    """Keep a pruned layer; what lay there is of another run that cannot be resumed."""
    if workers.is_main:
        store.discard()
    store.save(partial(_write_layer, workers, layer, figures), index)


def _write_layer(
    workers: WorkerGroup,
    layer: DecoderLayer,
    figures: dict[str, MatrixFigures],
    files: CheckpointFiles,
) -> None:
    if not workers.is_main:
        return
    with files.file(_TENSORS_FILE) as stream:
        write_tensors(stream, _weights(layer))
    values = {name: asdict(one) for name, one in figures.items()}
    files.put(_FIGURES_FILE, json.dumps(values).encode())


def _weights(layer: DecoderLayer) -> dict[str, Tensor]:
    """Return the whole weights that hold a layer's matrices, by name."""
    return {
        matrix.weight: matrix.module.get_parameter(matrix.attribute).detach()
        for matrix in layer.matrices.values()
    }


def _load_layer(store: CheckpointStore, layer: DecoderLayer) -> dict[str, MatrixFigures] | None:
    """Restore a layer that was pruned before, if it was."""
    found = store.restore(
        lambda saved: (load(saved.read(_TENSORS_FILE)), json.loads(saved.read(_FIGURES_FILE))),
        announced=False,
    )
    if found is None:
        return None
    tensors, values = found
    for name, weight in _weights(layer).items():
        weight.copy_(tensors[name])
    return {name: MatrixFigures(**one) for name, one in values.items()}
