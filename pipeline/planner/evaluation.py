"""Bytes that an evaluation takes of a worker's device: one model at a time, and nothing to be kept."""

from typing import Any, cast

from torch import nn

from pipeline.evaluation.head import SLICE_BYTES, find_layers_output
from pipeline.planner.memory import gathered_bytes, num_decoder_layers
from pipeline.runs.config import RunConfig
from pipeline.tasks import Task, make_task
from pipeline.tasks.base import TokenTask

_OF_A_LAYER = 17  # numbers a token and unit of width, as in `memory.activation_bytes`
_FLOAT32 = 4


def evaluation_bytes(config: RunConfig, empty: nn.Module, total: int) -> dict[str, int]:
    """Return what evaluating a model takes of a worker's device, by what it is for.

    Args:
        config: of the run.
        empty: the model, on the meta device.
        total: its parameters.
    """
    zero, task = config.zero, make_task(config.task)
    width, length = zero.dtype.itemsize, config.task.max_length
    rows = config.evaluate.rows_of(task.tokens_of(length))
    held = (total if zero.stage < 3 else -(-total // config.cluster.num_workers)) * width
    hidden = int(_settings(empty).hidden_size)
    found = {
        "parameters": 0 if zero.offload_parameters else held,
        "buckets": gathered_bytes(zero, config.cluster.gpus > 0, total) if zero.stage == 3 else 0,
        "activations (estimate)": _OF_A_LAYER * rows * length * hidden * width,
    }
    if isinstance(task, TokenTask):
        found["logits"] = _logits_bytes(config, empty, task, rows * length)
    elif task.auto_model == "AutoModelForSeq2SeqLM":
        beams = rows * int(getattr(config.task, "num_beams", 1))
        tokens = beams * (length + int(getattr(config.task, "max_target_length", 0)))
        layers = num_decoder_layers(_settings(empty))
        found["keys and values"] = 2 * layers * tokens * hidden * width
        found["logits"] = beams * int(_settings(empty).vocab_size) * (width + 2 * _FLOAT32)
    return {name: size for name, size in found.items() if size}


def _logits_bytes(config: RunConfig, empty: nn.Module, task: Task, tokens: int) -> int:
    """Return what a slice's logits take, in the model's dtype, in float32 and as log-probabilities."""
    width, vocabulary = config.zero.dtype.itemsize, int(_settings(empty).vocab_size)
    layers = find_layers_output(
        cast(Any, empty).config, task.auto_model, trust_remote_code=config.model.trust_remote_code
    )
    most = max(SLICE_BYTES // (_FLOAT32 * vocabulary), 1)
    scored = min(tokens, most) * vocabulary * (_FLOAT32 + (_FLOAT32 if width < _FLOAT32 else 0))
    return scored + (tokens if layers is None else min(tokens, most)) * vocabulary * width


def _settings(empty: nn.Module) -> Any:
    return cast(Any, empty).config.get_text_config()
