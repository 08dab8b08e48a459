"""Weights without a gradient in a step: DeepSpeed keeps what they had in the step before."""

from typing import Any

import torch


def clear_gradients(engine: Any) -> None:
    """Zero the gradients that are left of the last step; call it before the first micro-batch of each.

    ZeRO 3 and optimizer offload write the gradients of a step into buffers that stay. A weight that took
    no part in a step, such as those of a layer left out, would be updated by its gradient of before.
    At stage 0 it fills in zeros of the weight's dtype, which torch refuses where gradients have another
    (`Tensor.grad_dtype`): there the zeros are made here.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter in engine.module.parameters():
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
            if parameter.requires_grad and parameter.grad is None and dtype != parameter.dtype:
                parameter.grad = torch.zeros_like(parameter, dtype=dtype)
        return
    if stage == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
        flats = optimizer.fp32_partitioned_groups_flat
    else:
        flats = getattr(optimizer, "single_partition_of_fp32_groups", ())  # not BF16_Optimizer's
        for accumulated in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
            accumulated.zero_()
    for flat in flats:
        if flat.grad is not None:
            flat.grad.zero_()
