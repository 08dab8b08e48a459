"""The prior's gradient on a GPU: one kernel that reads each weight and gradient once.

Triton comes with torch's builds for GPUs; this module is imported only where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    grad,
    weight,
    numel,
    constant,
    slope,
    spike_pull,
    slab_pull,
    BLOCK: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    w = tl.load(weight + at, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0)
    in_spike = tl.sigmoid(-(constant + slope * w * w))  # P(spike|w)
    tl.store(grad + at, g + w * (spike_pull * in_spike + slab_pull), mask=inside)


def add_prior_grad_fused_(
    grad: Tensor,
    weight: Tensor,
    *,
    constant: float,
    slope: float,
    spike_pull: float,
    slab_pull: float,
) -> None:
    """Add w (spike_pull P(spike|w) + slab_pull) to `grad`, in place.

    Args:
        grad: float32, 1-D, contiguous.
        weight: the same shape, dtype and device.
        constant: the slab's log-odds at w = 0.
        slope: what they rise by with w^2.
        spike_pull: added for a weight that is surely in the spike, over the weight.
        slab_pull: added for every weight, over the weight.
    """
    if grad.numel() == 0:
        return
    grid = (triton.cdiv(grad.numel(), _BLOCK),)
    with torch.cuda.device_of(grad):
        _kernel[grid](
            grad, weight, grad.numel(), constant, slope, spike_pull, slab_pull, BLOCK=_BLOCK
        )
