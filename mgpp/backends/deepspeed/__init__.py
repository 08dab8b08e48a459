"""DeepSpeed ZeRO 0-3: where this rank's float32 shards lie, and hooks on the client optimizer.

The optimizer handed to `deepspeed.initialize` is, at its `step`, given exactly this rank's float32
partition and its gradient: reduced, averaged, accumulated, unscaled and clipped. So two hooks on it,
with the prunable weights in a parameter group of their own, see all that pruning needs, and what the
second one writes is copied to the low-precision weights by ZeRO itself.

    stage             inner steps         the shards are ranges of
    0                 1                   the parameters, or their float32 copies (replicated)
    1, 2              1 a group           one flat partition a group
    1, bf16 + fp32    1                   the same (BF16_Optimizer)
    3                 1 a sub-group       one flat partition a sub-group

    layout.py     where this rank's shards of parameters lie
    hooks.py      pruning at the inner optimizer's steps
    state.py      training state by parameter and range, for checkpoints of any layout
    weights.py    the weights that the model computes with, as ZeRO 3 cuts them
    gradients.py  what is left of a step's gradients
    refusals.py   modes in which DeepSpeed is wrong or cannot be hooked

Only these files know DeepSpeed's insides; they were written against 0.19.
"""

from mgpp.backends.deepspeed.gradients import clear_gradients
from mgpp.backends.deepspeed.hooks import attach
from mgpp.backends.deepspeed.refusals import unsupported_settings
from mgpp.backends.deepspeed.state import (
    TrainedShard,
    copy_to_low_precision,
    engine_counters,
    load_engine_counters,
    load_masters,
    training_state,
)
from mgpp.backends.deepspeed.weights import local_shards, shard_numel

__all__ = [
    "TrainedShard",
    "attach",
    "clear_gradients",
    "copy_to_low_precision",
    "engine_counters",
    "load_engine_counters",
    "load_masters",
    "local_shards",
    "shard_numel",
    "training_state",
    "unsupported_settings",
]
