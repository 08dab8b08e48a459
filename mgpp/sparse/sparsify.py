"""A model's linear layers as sparse ones, where that is faster on this machine."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from mgpp.sparse.linear import SparseLinear
from mgpp.sparse.speed import SpeedTable

TOKENS = (1, 16, 128)
_LEAST_SPARSITY = 0.6  # below it no processor was seen to gain
_LEAST_SPEEDUP = 1 / 1.05
# They read their layers' weights themselves.
_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True, kw_only=True)
class Sparsified:
    """What became of a model's linear layers.

    Attributes:
        replaced: how many times as fast each replaced layer is, over the numbers of tokens (geometric
            mean), by name.
        kept: why the others stay dense, by name.
    """

    replaced: dict[str, float]
    kept: dict[str, str]

    @property
    def most_kept(self) -> str:
        """Why most of the others stay dense."""
        reasons = Counter(self.kept.values()).most_common(1)
        return reasons[0][0] if reasons else "it has no linear layers"


def sparsify_(
    model: nn.Module, *, tokens: Sequence[int] = TOKENS, table: SpeedTable | None = None
) -> Sparsified:
    """Replace linear layers by sparse ones where that pays, for inference in float32 on CPUs.

    A layer is replaced if it is faster over the numbers of tokens, and for none of them more than 5%
    slower. Each shape and sparsity is measured once on a machine, which takes about a second.

    Args:
        model: changed in place; `nn.Linear` and GPT-2's `Conv1D` in it. On CPUs that MKL does not support
            (torch without it) all layers stay as they are.
        tokens: how many a layer is to be fast for: rows of a batch times their length.
        table: where measurements are kept.

    Returns:
        Which layers were replaced, and why not the others.
    """
    table = table or SpeedTable()
    replaced, kept = {}, {}
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, parent, child in list(_linear_layers(model)):
        layer: nn.Module = getattr(parent, child)
        why = _why_not(layer, shared)
        if not why:
            transposed = not isinstance(layer, nn.Linear)
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight = weight.detach().t().contiguous() if transposed else weight.detach()
            block, found = table.speedups(weight, tokens)
            speedup = prod(found) ** (1 / len(found))
            if min(found) >= _LEAST_SPEEDUP and speedup > 1:
                bias: Tensor | None = layer.bias  # type: ignore[assignment]
                made = SparseLinear(weight, bias, block=block, transposed=transposed)
                setattr(parent, child, made.train(layer.training))
                replaced[name] = speedup
                continue
            why = f"not faster: {min(found):.2f} times at worst"
        kept[name] = why
    return Sparsified(replaced=replaced, kept=kept)


def _linear_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the name, the parent and the name within it of each layer that may be replaced."""
    if isinstance(module, _WHOLE):
        return
    for child, layer in module.named_children():
        if type(layer) is nn.Linear or is_conv1d(layer):
            yield f"{prefix}{child}", module, child
        else:
            yield from _linear_layers(layer, f"{prefix}{child}.")


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D: x W + b, with W as [in, out]."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _why_not(layer: nn.Module, shared: Counter[int]) -> str:
    """Return why a layer stays dense before any measurement, or an empty string."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if weight.device.type != "cpu":
        return f"on {weight.device.type}"
    if not torch.backends.mkl.is_available():
        return "this torch has no MKL"
    if weight.dtype != torch.float32:
        return f"in {str(weight.dtype).removeprefix('torch.')}; sparse layers compute in float32"
    if shared[id(weight)] > 1:
        return "shared with another layer"
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    return f"{sparsity:.0%} zeros" if sparsity < _LEAST_SPARSITY else ""
