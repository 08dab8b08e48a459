"""Further keys of DeepSpeed's configuration (`zero.extra`): what may be given, what is in keys."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pipeline.errors import Problem

ZERO = "zero_optimization"
# Keys of DeepSpeed's that are ours to set, and by what; an optimizer of its own would not be pruned.
_OWNED = {
    "optimizer": "the pruned training (AdamW)",
    "scheduler": "train.lr and train.lr_warmup_length",
    "zero_allow_untested_optimizer": "the pruned training (AdamW)",
    "zero_force_ds_cpu_optimizer": "the pruned training (AdamW)",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "managed_gradient_accumulation": "train.batch_size",
    "gradient_allreduce_op": "the mean over the whole batch",
    "gradient_clipping": "train.gradient_clipping",
    "stage": "zero.stage",
    "bfloat16": "zero.precision",
    "torch_autocast": "zero.precision",
    "communication_data_type": "zero.gradients",
    "data_types": "zero.precision and zero.gradients",
}
_PRECISIONS = ("fp16", "bf16")
# Master weights and the optimizer's states are float32: the prior's pull is lost in fewer bits.
_LOW_STATES = (
    "fp16_master_weights_and_grads",
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
)
# What says where things lie, how much moves at a time and what is logged. All else counts in keys:
# of what is not known to leave results as they are, that is safe.
_OF_LAYOUT = {
    "aio",
    "comms_logger",
    "csv_monitor",
    "comet",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
}
_OF_ZERO_LAYOUT = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "enable_sanity_checks",
    "leaf_module",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "override_module_apply",
    "parameter_alignment",
    "pipeline_loading_checkpoint",
    "reduce_bucket_size",
    "reduce_scatter",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
    *(
        name
        for short in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
        )
        for name in (short, f"stage3_{short}")
    ),
}


def merged(values: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration with further keys; sections of ours get theirs added.

    Args:
        values: the configuration our settings make.
        extra: the further keys.
    """
    of_ours = {
        name: {**values[name], **section}
        for name, section in extra.items()
        if isinstance(section, dict) and isinstance(values.get(name), dict)
    }
    return {**values, **extra, **of_ours}


def extra_in_key(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further keys that results may depend on, for the keys of stages: `extra`, or nothing."""
    counted = {name: value for name, value in extra.items() if name not in _OF_LAYOUT}
    if isinstance(inner := counted.pop(ZERO, None), dict):
        inner = {name: value for name, value in inner.items() if name not in _OF_ZERO_LAYOUT}
    if inner:
        counted[ZERO] = inner
    return {"extra": counted} if counted else {}


def extra_problems(
    extra: Mapping[str, Any], values: dict[str, Any], precision: str
) -> list[Problem]:
    """Return the further keys that DeepSpeed does not take, or that a setting of ours decides.

    Args:
        extra: the further keys.
        values: the configuration our settings make without them.
        precision: of the forward and backward pass.
    """
    if not extra:
        return []
    found = list(_key_problems(extra, precision))
    return found or list(_value_problems(extra, values))


def _key_problems(extra: Mapping[str, Any], precision: str) -> Iterator[Problem]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # takes seconds to import

    inner = extra.get(ZERO, {})
    if not isinstance(inner, dict):
        yield Problem(f"zero.extra.{ZERO}", "must be a mapping", got=inner)
        inner = {}
    specs = DeepSpeedZeroConfig.model_fields
    known = {*specs, *filter(None, (spec.alias for spec in specs.values()))}
    for where, given, names in (
        ("zero.extra", extra, set(_defaults_read()) | set(_removed())),
        (f"zero.extra.{ZERO}", inner, known),
    ):
        for key in given:
            owner = _OWNED.get(key)
            if owner is not None:
                yield Problem(f"{where}.{key}", f"{owner} sets it", hint="leave it out")
            elif key in _removed():
                yield Problem(f"{where}.{key}", f"DeepSpeed refuses it: {_removed()[key]}")
            elif key not in names:
                close = tuple(get_close_matches(str(key), sorted(names)))
                yield Problem(f"{where}.{key}", "DeepSpeed has no such key", allowed=close)
    for name in _PRECISIONS:
        if name in extra:
            yield from _precision_problems(name, extra[name], precision)


def _precision_problems(name: str, section: Any, precision: str) -> Iterator[Problem]:
    """Yield what a section of settings of a precision says that `zero.precision` decides."""
    key = f"zero.extra.{name}"
    if not isinstance(section, dict):
        yield Problem(key, "must be a mapping", got=section)
        return
    if name != precision:
        yield Problem(key, f"zero.precision is {precision}", hint="leave it out")
        return
    if section.get("enabled", True) is not True:
        yield Problem(
            f"{key}.enabled", "zero.precision sets it", got=section["enabled"], hint="leave it out"
        )
    for setting in _LOW_STATES:
        if section.get(setting):
            yield Problem(
                f"{key}.{setting}",
                "master weights and the optimizer's states are float32",
                hint="leave it out",
            )


def _value_problems(extra: Mapping[str, Any], values: dict[str, Any]) -> Iterator[Problem]:
    """Yield the values that DeepSpeed cannot read, or that pruning cannot go with, each by its key."""
    defaults, alone = _defaults_read(), []
    for name, value in extra.items():
        default = values.get(name, defaults.get(name))
        words = _expected(default)
        if words and not _is_like(value, default):
            yield Problem(f"zero.extra.{name}", f"must be {words}", got=value)
        elif name == ZERO:
            alone += [(f"{ZERO}.{inner}", {ZERO: {inner: of}}) for inner, of in value.items()]
        else:
            alone.append((name, {name: value}))
    wrong = False
    for name, one in alone:
        for reason in _refusals({**merged(values, one)}):
            wrong = True
            yield Problem(f"zero.extra.{name}", reason)
    if not wrong:  # each alone is right, so they do not go together
        for reason in _refusals(merged(values, extra)):
            yield Problem("zero.extra", reason)


def _refusals(values: dict[str, Any]) -> list[str]:
    """Return why DeepSpeed does not read a configuration, or why nothing can be pruned under it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from mgpp.backends.deepspeed import unsupported_settings

    try:
        read = DeepSpeedConfig(values)
    except Exception as error:  # noqa: BLE001  (values are used before anything looks at them)
        return [f"DeepSpeed refuses it: {_reason(error)}"]
    return [
        f"cannot be pruned under: {reason}" for reason in unsupported_settings(read.zero_config)
    ]


def _reason(error: Exception) -> str:
    """Return an error of DeepSpeed's in one line; of pydantic's, which value and why."""
    details = getattr(error, "errors", None)
    if callable(details):
        return "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}" if one["loc"] else one["msg"]
            for one in details()
        )
    if isinstance(error, AttributeError | TypeError):
        return "a value of another type is needed"
    return " ".join(str(error).split()) or type(error).__name__


def _expected(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    return "a number" if isinstance(default, int | float) else ""


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, int | float)


def _removed() -> dict[str, str]:
    """Return the keys that DeepSpeed had once, with what it says of them."""
    from deepspeed.runtime import config

    return dict(getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}))


def _defaults_read() -> dict[str, Any]:
    """Return the top-level keys that DeepSpeed reads of its configuration, with the defaults it has.

    They are written down nowhere, so it is watched as it reads one.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    read: dict[str, Any] = {}

    class Watched(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            read.setdefault(str(key), None)
            return super().__contains__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read[key] = default
            return super().get(key, default)

        def keys(self) -> Any:
            return self  # they are only asked for whether one is among them

        def __copy__(self) -> "Watched":
            return self

    DeepSpeedConfig(Watched(train_micro_batch_size_per_gpu=1))
    return read
