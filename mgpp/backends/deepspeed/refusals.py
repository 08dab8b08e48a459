"""Modes in which DeepSpeed is wrong or cannot be hooked."""

from typing import Any


def refuse_unsupported(engine: Any) -> None:
    """Refuse what cannot be pruned under.

    Raises:
        ValueError: with the reason, and what to use.
    """
    stage = engine.zero_optimization_stage()
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
    ]
    reasons = [reason for wrong, reason in problems if wrong]
    reasons += unsupported_settings(engine._config.zero_config)
    if reasons:
        raise ValueError(f"cannot prune under this DeepSpeed configuration: {reasons[0]}")


def unsupported_settings(zero: Any) -> list[str]:
    """Return why nothing can be pruned under ZeRO's settings, with what to use; empty if it can.

    Args:
        zero: `zero_config` of DeepSpeed's configuration.
    """
    offload = zero.offload_optimizer
    problems = [
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
    return [reason for wrong, reason in problems if wrong]
