"""DeepSpeed's settings: ours to DeepSpeed's dictionary, in one place."""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch

from pipeline.errors import Problem, StageError
from pipeline.section import Positive, Section
from pipeline.training.zero_extra import extra_problems, merged

_FLOAT32_AT_STAGE_0 = hasattr(torch.Tensor, "grad_dtype")  # from torch 2.10 on
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
_NO_COMPILER = "TORCHDYNAMO_DISABLE"
_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class ZeroConfig(Section):
    """How weights, gradients and optimizer states are sharded over the workers."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    precision: Precision = "auto"
    """Of the forward and backward pass; master weights are float32 always. tf32 is float32 whose matrix
    products NVIDIA GPUs round to 10 bits; auto is bf16 on GPUs that have it, else fp32."""
    gradients: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype that gradients are summed in, over workers and micro-batches: fp32 or that of `precision`,
    which halves what is sent and kept for them, and rounds every sum."""
    offload_optimizer: bool = False
    """Keep optimizer states and master weights in CPU memory."""
    offload_parameters: bool = False
    """Keep parameters in CPU memory too (stage 3)."""
    nvme_path: str | None = None
    """Folder on each node's NVMe: parameters are kept there, not in CPU memory; needs libaio."""
    bucket_elements: Positive | None = None
    """Elements gathered or reduced at a time; 5e8 on GPUs and 5e6 on CPUs unless given."""
    extra: dict[str, Any] = {}
    """Further keys of DeepSpeed's configuration, merged last; sections, such as "zero_optimization" and
    the loss scale's "fp16", are merged too."""

    @property
    def widens_gradients(self) -> bool:
        """Whether gradients are float32 where the backward pass makes them in 16 bits."""
        return self.gradients == "fp32" and self.dtype != torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights, once what `auto` comes to is known."""
        assert self.precision != "auto", "not settled: see pipeline.runs.hardware"
        return _DTYPES[self.precision]

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of sums of gradients."""
        return _DTYPES[self.gradients]


def deepspeed_config(
    zero: ZeroConfig,
    *,
    micro_batch_size: int,
    accumulation: int,
    gradient_clipping: float | None,
    on_gpu: bool,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    The optimizer is a client optimizer (DeepSpeed calls every one it does not ship untested), and
    CPU memory buckets are small, because the defaults reserve 5e8 elements.

    Args:
        zero: our settings.
        micro_batch_size: examples a worker takes in one forward pass.
        accumulation: forward passes an optimizer step.
        gradient_clipping: largest global norm, or None.
        on_gpu: whether the workers have GPUs.
    """
    bucket = zero.bucket_elements or default_bucket(on_gpu)
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "allgather_bucket_size": bucket,
        "reduce_bucket_size": bucket,
        "overlap_comm": on_gpu,
    }
    if zero.stage == 3:
        sharding["stage3_prefetch_bucket_size"] = bucket // 10
        sharding["stage3_max_live_parameters"] = 10 * bucket
    if zero.offload_optimizer:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if zero.offload_parameters:
        sharding["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    if zero.nvme_path:
        sharding["offload_param"] |= {"device": "nvme", "nvme_path": zero.nvme_path}
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": sharding,
    }
    if zero.dtype != torch.float32:
        values[zero.precision] = {"enabled": True}
    if zero.widens_gradients:
        # Either alone rounds: what is accumulated, or what was summed over the workers.
        values["communication_data_type"] = "fp32"
        if zero.stage > 0:
            values["data_types"] = {"grad_accum_dtype": "fp32"}
        if zero.stage == 2:
            # Otherwise the mean's division is made before the reduction, in 16 bits, which rounds unless
            # the workers are a power of two. What is sent is the same: DeepSpeed reduces to all anyway.
            sharding["reduce_scatter"] = False
    return merged(values, zero.extra)


def widen_gradients(zero: ZeroConfig, model: torch.nn.Module) -> None:
    """Let gradients of 16-bit weights be float32 at stage 0, if they are to be.

    DeepSpeed's stage 0 leaves them to autograd and knows no other dtype than the weights'. Call it after
    `deepspeed.initialize`, which fills in gradients of the weights' dtype.

    Args:
        zero: the settings.
        model: whose trained parameters' gradients are meant.
    """
    if zero.stage > 0 or not zero.widens_gradients:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def use_precision(zero: ZeroConfig) -> None:
    """Set whether this process's GPU may round float32 products to TF32: only if that was asked for.

    torch has two sets of flags for this. Where only the new ones are set, reading the old ones raises,
    and `torch.export` reads them: so both are.
    """
    rounds = zero.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = rounds
    torch.backends.cudnn.allow_tf32 = rounds
    products: Any = torch.backends
    for operations in (products.cuda.matmul, products.cudnn.conv, products.cudnn.rnn):
        operations.fp32_precision = "tf32" if rounds else "ieee"


def default_bucket(on_gpu: bool) -> int:
    """Return how many elements are gathered or reduced at a time."""
    return 500_000_000 if on_gpu else 5_000_000


def problems_of(zero: ZeroConfig) -> list[Problem]:
    """Return what of these settings DeepSpeed gets wrong, with what to use."""
    found = []
    if zero.precision == "fp16" and zero.stage == 0:
        found.append(
            Problem(
                "zero.precision",
                "fp16 at ZeRO stage 0 is wrong in DeepSpeed (the loss is never scaled, the gradients are "
                "divided)",
                hint="use zero.stage: 1, or bf16",
            )
        )
    if zero.offload_parameters and zero.stage != 3:
        found.append(Problem("zero.offload_parameters", "needs zero.stage: 3", got=zero.stage))
    if zero.nvme_path and not (zero.offload_parameters and zero.offload_optimizer):
        found.append(
            Problem(
                "zero.nvme_path",
                "needs zero.offload_parameters and zero.offload_optimizer; master weights and optimizer "
                "states stay in CPU memory",
            )
        )
    if zero.offload_optimizer and zero.stage == 0:
        found.append(Problem("zero.offload_optimizer", "needs zero.stage 1, 2 or 3", got=0))
    if zero.gradients not in ("fp32", zero.precision):
        found.append(
            Problem(
                "zero.gradients",
                f"must be fp32 or zero.precision, {zero.precision}",
                got=zero.gradients,
            )
        )
    in_16_bits = zero.precision in ("bf16", "fp16")
    if in_16_bits and zero.gradients == "fp32" and zero.stage == 0 and not _FLOAT32_AT_STAGE_0:
        found.append(
            Problem(
                "zero.gradients",
                "fp32 at zero.stage: 0 needs torch 2.10 or later",
                got=torch.__version__,
                hint=f"use zero.stage: 1, or zero.gradients: {zero.precision}",
            )
        )
    if found or not zero.extra:
        return found
    settled = "fp32" if zero.precision == "auto" else zero.precision
    plain = zero.model_copy(update={"extra": {}, "precision": settled})
    values = deepspeed_config(
        plain, micro_batch_size=1, accumulation=1, gradient_clipping=None, on_gpu=False
    )
    return extra_problems(zero.extra, values, zero.precision) or _narrowed_gradients(zero)


def _narrowed_gradients(zero: ZeroConfig) -> list[Problem]:
    """Return the further keys by which DeepSpeed would not reduce in float32 what is to be."""
    if zero.gradients != "fp32":
        return []
    inner = zero.extra.get("zero_optimization", {})
    widens = zero.precision in ("bf16", "fp16")
    narrowing = {
        "zero_optimization.zero_quantized_gradients": inner.get("zero_quantized_gradients"),
        "zero_optimization.reduce_scatter": zero.stage == 2
        and widens
        and inner.get("reduce_scatter"),
    }
    hint = (
        "" if zero.precision == "fp32" else f"leave it out, or use zero.gradients: {zero.precision}"
    )
    return [
        Problem(
            f"zero.extra.{key}",
            "rounds gradients before they are reduced; zero.gradients is fp32",
            hint=hint,
        )
        for key, narrows in narrowing.items()
        if narrows
    ]


def check_capabilities(zero: ZeroConfig) -> None:
    """Make sure that this node can do what is asked.

    Raises:
        StageError: saying what is missing.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if zero.nvme_path and not AsyncIOBuilder().is_compatible(verbose=False):
        raise StageError(
            "zero.nvme_path: DeepSpeed's async_io cannot be built on this node: install libaio with its "
            "headers (libaio-dev, libaio-devel), or leave zero.nvme_path out to keep parameters in CPU "
            "memory"
        )


def load_operators(zero: ZeroConfig, notify: Callable[[str], None]) -> None:
    """Load DeepSpeed's C++ operators that these settings use; the first time, each node compiles them.

    The processes of a node wait for the one that compiles. What is compiled stays in
    `TORCH_EXTENSIONS_DIR`.

    Args:
        zero: the settings.
        notify: called with a note before an operator is loaded or compiled.

    Raises:
        StageError: if this node cannot compile what is asked.
    """
    check_capabilities(zero)
    from deepspeed.accelerator import get_accelerator

    names = []
    if zero.nvme_path:
        names.append("AsyncIOBuilder")
    if _shared_memory_asked() and get_accelerator().device_name() == "cpu":
        names.append("ShareMemCommBuilder")
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        notify(
            f"loading DeepSpeed's {builder.NAME}; each node compiles it once, for a minute or more"
        )
        builder.load(verbose=False)


def _shared_memory_asked() -> bool:
    return os.environ.get("MGPP_DEEPSPEED_SHM") == "1"


def init_deepspeed(backend: str) -> None:
    """Start DeepSpeed's communication over the process group that is already there.

    On CPUs DeepSpeed would first compile a shared-memory all-reduce of its own, for a minute or more;
    gloo is as fast for gradients of tens of millions of elements (measured on 2 ranks: 0.09 s against
    0.10 s for 22M float32), so that operator is declared unavailable unless MGPP_DEEPSPEED_SHM=1.
    """
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    import_muon()
    if not _shared_memory_asked():
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


def import_muon() -> None:
    """Import DeepSpeed's Muon without torch's compiler.

    ZeRO's optimizers import it, and as it is defined it is wrapped by `torch.compile`, which imports all
    of Inductor: 0.8 s and 41 MB of each worker. Muon is none of the optimizers here.
    """
    given = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        if given is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = given
