"""Modes in which DeepSpeed is wrong or cannot be hooked."""

from typing import Any


def refuse_unsupported(engine: Any) -> None:
    """Refuse what cannot be pruned under.

    Raises:
        ValueError: with the reason, and what to use.
    """
    zero = engine._config.zero_config
    stage = engine.zero_optimization_stage()
    offload = zero.offload_optimizer
    problems = [
        (
            stage == 0 and engine.fp16_enabled(),
            "fp16 at ZeRO stage 0: DeepSpeed never scales the loss but divides the gradients by the "
            "scale; use ZeRO stage 1, or bf16",
        ),
        (
            stage == 0 and hasattr(engine.optimizer, "fp32_groups_flat"),
            "a fused optimizer at ZeRO stage 0: its master weights are flattened; use ZeRO stage 1, or "
            "torch.optim.AdamW",
        ),
        (
            zero.round_robin_gradients,
            "zero_optimization.round_robin_gradients: it reorders the flat partitions; turn it off",
        ),
        (
            offload is not None and offload.ratio < 1,
            "zero_optimization.offload_optimizer.ratio below 1: the part kept on the device is "
            "updated by a second optimizer without our hooks; set ratio to 1",
        ),
        (
            getattr(zero, "zenflow", None) is not None,
            "ZenFlow: its asynchronous updates pass by the optimizer's hooks; turn it off",
        ),
        (
            offload is not None and getattr(offload, "super_offload", False),
            "SuperOffload: its updates run in another process; turn it off",
        ),
        (
            offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme",
            "optimizer offload to NVMe: the master weights are not in memory at the threshold; use "
            "CPU offload",
        ),
    ]
    for wrong, reason in problems:
        if wrong:
            raise ValueError(f"cannot prune under this DeepSpeed configuration: {reason}")
