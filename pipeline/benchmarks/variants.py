"""The ways to run a checkpoint on a CPU: each loads the folder and makes a model of it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgpp.sparse.loading import load_dense
from mgpp.sparse.packed_files import packed_layout
from mgpp.sparse.sparsify import is_conv1d, sparsify_

FP32 = "fp32"
_CPU_FLAGS = Path("/proc/cpuinfo")


class UnavailableError(Exception):
    """A variant that this machine, or this model, cannot run; says why."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to run.

    Attributes:
        model: in evaluation mode.
        note: what a reader should know of it, or an empty string.
    """

    model: Any
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run a checkpoint.

    Attributes:
        title: for people.
        load: makes it of a folder, for the numbers of tokens it is to be fast for.
        file_bytes: of its weights as they are stored, given the float32 model and this one.
    """

    title: str
    load: Callable[[Path, Sequence[int]], Loaded]
    file_bytes: Callable[[nn.Module, nn.Module], int]


def _fp32(folder: Path, tokens: Sequence[int]) -> Loaded:
    return Loaded(model=load_dense(folder))


def _bf16(folder: Path, tokens: Sequence[int]) -> Loaded:
    note = "" if _has_bf16() else "this processor has no bf16 instructions: they are emulated"
    return Loaded(model=load_dense(folder, dtype=torch.bfloat16), note=note)


def _int8(folder: Path, tokens: Sequence[int]) -> Loaded:
    if torch.backends.quantized.engine == "none":
        raise UnavailableError("this torch has no kernels for int8")
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise UnavailableError(f"this torch has no quantize_dynamic: {error}") from error
    model = load_dense(folder)
    _use_linear(model)
    with warnings.catch_warnings():
        # It is deprecated for torchao, which is one more package to install for the same kernels.
        warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
    return Loaded(model=model, note="weights by output channel, activations at each call")


def _sparse(folder: Path, tokens: Sequence[int]) -> Loaded:
    if not torch.backends.mkl.is_available():
        raise UnavailableError("this torch has no MKL")
    model = load_dense(folder)
    found = sparsify_(model, tokens=tokens)
    if not found.replaced:
        raise UnavailableError(f"all layers stay dense: {found.most_kept}")
    count = len(found.replaced)
    kept = f"; {len(found.kept)} stay dense, most: {found.most_kept}" if found.kept else ""
    return Loaded(model=model, note=f"{count} of {count + len(found.kept)} layers sparse{kept}")


def _plain_bytes(fp32: nn.Module, model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _stored(model))


def _packed_bytes(fp32: nn.Module, model: nn.Module) -> int:
    sizes = ((tensor, packed_layout(tensor)) for tensor in _stored(fp32))
    return sum(t.nbytes if layout is None else layout.num_bytes(t.itemsize) for t, layout in sizes)


def _saved_bytes(fp32: nn.Module, model: nn.Module) -> int:
    counter = _Counter()
    torch.save(model.state_dict(), counter)  # type: ignore[arg-type]
    return counter.num_bytes


class _Counter:
    """A file that counts what is written to it."""

    num_bytes = 0

    def write(self, data: bytes) -> int:
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing."""


VARIANTS: Mapping[str, Variant] = {
    FP32: Variant(title="dense fp32", load=_fp32, file_bytes=_plain_bytes),
    "bf16": Variant(title="dense bf16", load=_bf16, file_bytes=_plain_bytes),
    "int8": Variant(title="int8 dynamic", load=_int8, file_bytes=_saved_bytes),
    "sparse": Variant(title="sparse fp32", load=_sparse, file_bytes=_packed_bytes),
}


def _stored(model: nn.Module) -> list[Tensor]:
    """Return the tensors that a checkpoint of a model holds, shared ones once."""
    return list({t.data_ptr(): t for t in model.state_dict().values()}.values())


def _has_bf16() -> bool:
    """Return whether the processor computes in bf16; True where that is not known."""
    try:
        lines = _CPU_FLAGS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return True
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "bf16")
    return "bf16" in flags


def _use_linear(module: nn.Module) -> None:
    """Replace GPT-2's Conv1D by the linear layers they are, which alone torch quantizes."""
    for name, child in list(module.named_children()):
        if is_conv1d(child):
            weight: Tensor = child.weight  # type: ignore[assignment]
            bias: Tensor = child.bias  # type: ignore[assignment]
            linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
            linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
            setattr(module, name, linear)
        else:
            _use_linear(child)
