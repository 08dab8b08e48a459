"""How long an optimizer step takes at least and at most, at a stated rate of devices and network."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from pipeline.planner.memory import num_decoder_layers


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, without the optimizer's update, pruning and reading rows.

    Attributes:
        compute: of the forward and backward passes; None where no rate was given.
        communication: of what is sent; None where no bandwidth was given.
    """

    compute: float | None
    communication: float | None

    @property
    def shortest(self) -> float | None:
        """If computing and sending overlap entirely."""
        if self.compute is None or self.communication is None:
            return None
        return max(self.compute, self.communication)

    @property
    def longest(self) -> float | None:
        """If they do not overlap at all."""
        if self.compute is None or self.communication is None:
            return None
        return self.compute + self.communication


def step_time(
    *, flops: float, sent: float, device_tflops: float | None, bandwidth_gbit: float | None
) -> StepTime:
    """Return what a step takes.

    Args:
        flops: floating-point operations of a worker.
        sent: bytes that it sends.
        device_tflops: 1e12 operations a second that a device reaches.
        bandwidth_gbit: 1e9 bits a second that each device sends at.
    """
    return StepTime(
        compute=None if device_tflops is None else flops / (device_tflops * 1e12),
        communication=None if bandwidth_gbit is None else 8 * sent / (bandwidth_gbit * 1e9),
    )


def step_flops(
    model: nn.Module,
    *,
    rows: int,
    length: int,
    target_length: int,
    recomputed: bool,
    of_teacher: int = 0,
) -> int:
    """Return the floating-point operations of a worker for one optimizer step.

    Matrices take 6 a parameter and token, 8 where the forward pass is made again for the backward pass;
    attention 12 (16) a layer, unit of width, token and token attended to (Chowdhery et al., arXiv
    2204.02311, appendix B). Masked attention counts whole, and so do all experts of a mixture. An encoder
    and a decoder are taken to be half of the parameters each; a teacher takes 2 a parameter and token.

    Args:
        model: on the meta device.
        rows: of all micro-batches of a step.
        length: tokens of one row; of its source, where there is an encoder and a decoder.
        target_length: tokens of a row's target; used where there is an encoder and a decoder.
        recomputed: whether layers are recomputed in the backward pass.
        of_teacher: parameters of a teacher.
    """
    settings: Any = cast(Any, model).config.get_text_config()
    total = sum(p.numel() for p in model.parameters())
    each = 8 if recomputed else 6
    size = getattr(settings, "head_dim", None)
    heads = int(settings.num_attention_heads)
    width = heads * int(size) if size else int(settings.hidden_size)
    attended = rows * length * length * int(settings.num_hidden_layers)
    tokens = rows * length
    if settings.is_encoder_decoder:
        across = target_length * target_length + target_length * length
        attended += rows * across * num_decoder_layers(settings)
        tokens = rows * (length + target_length) // 2
    return each * total * tokens + 2 * each * width * attended + 2 * of_teacher * tokens
