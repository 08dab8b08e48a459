"""Bytes that training takes of a worker, counted from shapes and from how ZeRO's stages lay state out."""

from typing import Any, cast

from torch import nn

from pipeline.training.deepspeed import ZeroConfig, default_bucket
from pipeline.training.distill import DistillConfig

SUB_GROUP = 10**9  # elements of a shard that ZeRO 3 steps at once, by default
MASTER, _MOMENTS = 4, 8  # bytes a weight: float32, and AdamW's two averages


def checkpoint_bytes(trained: int, prunable: int, num_kept: int = 0, num_masks: int = 1) -> int:
    """Return what one checkpoint takes: master weights, Adam's moments, masks, what the method keeps.

    Args:
        trained: parameters that are trained.
        prunable: of them, those that are pruned.
        num_kept: numbers the pruning method keeps of each of these.
        num_masks: bits of each: its mask, and one more where zeros are kept.
    """
    masks = prunable * num_masks // 8
    return trained * (MASTER + _MOMENTS) + masks + prunable * num_kept * MASTER


def copied_bytes(
    zero: ZeroConfig,
    trained: int,
    prunable: int,
    world_size: int,
    num_kept: int = 0,
    num_masks: int = 1,
) -> int:
    """Return what a worker's copy of a checkpoint takes while it is written in the background.

    At stage 0 one worker writes it all. Arguments are those of `state_bytes`.
    """
    sharers = world_size if zero.stage else 1
    return checkpoint_bytes(-(-trained // sharers), -(-prunable // sharers), num_kept, num_masks)


def state_bytes(
    zero: ZeroConfig,
    total: int,
    trained: int,
    prunable: int,
    world_size: int,
    num_kept: int = 0,
    num_masks: int = 1,
    *,
    accumulated: bool = False,
    largest: int = 0,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return what parameters, gradients, optimizer and masks take of one worker, where it is most.

    That is at the optimizer's step, or at stage 1 the backward pass's end, where gradients are whole.

    Args:
        zero: how state is sharded.
        total: parameters of the model.
        trained: of them, those that are trained.
        prunable: of them, those that are pruned.
        world_size: workers.
        num_kept: numbers the pruning method keeps of each prunable weight.
        num_masks: bits of each: its mask, and one more where zeros are kept.
        accumulated: whether a step has several micro-batches.
        largest: elements of the largest parameter that is trained.

    Returns:
        By what it is for: bytes on the device, and bytes in the host's memory.
    """
    width = zero.dtype.itemsize
    shard = -(-trained // world_size)
    optimizer = (zero.stage and shard) or trained
    parameters = total * width if zero.stage < 3 else -(-total // world_size) * width
    gradients, stepping, beside = _gradient_bytes(zero, trained, shard, accumulated)
    own = 0 if width == MASTER else trained  # float32 parameters are their own master weights
    master = (shard if zero.stage else own) * MASTER
    held = prunable if zero.stage == 0 else -(-prunable // world_size)
    states = {
        "master weights": master,
        "optimizer": optimizer * _MOMENTS,
        "gradients of the step": stepping,
        "masks": num_masks * -(-held // 8),
        "kept by the method": held * num_kept * MASTER,
    }
    device = {"parameters": parameters, "gradients": gradients}
    host: dict[str, int] = {}
    (host if zero.offload_optimizer else device).update(states)
    host |= beside
    if zero.offload_optimizer and zero.stage < 3:
        for where in (device, host):  # one parameter's gradient on its way
            where["gradient that is copied"] = largest * width
    if zero.stage == 3 and zero.offload_optimizer:
        host["gradients"] = device.pop("gradients")
    if zero.offload_parameters:
        parameters = device.pop("parameters")
        host["parameters"] = 0 if zero.nvme_path else parameters
    return device, host


def _gradient_bytes(
    zero: ZeroConfig, trained: int, shard: int, accumulated: bool
) -> tuple[int, int, dict[str, int]]:
    """Return what gradients take: summed ones, those of the step, and what offload keeps beside them.

    Args:
        zero: how state is sharded.
        trained: parameters that are trained.
        shard: of them, one worker's.
        accumulated: whether a step has several micro-batches.
    """
    width, summed = zero.dtype.itemsize, zero.gradient_dtype.itemsize
    away = zero.offload_optimizer
    if zero.stage == 3:
        # The float32 gradients of what is stepped at once are made beside those that were summed.
        return shard * summed, (shard if away else min(shard, SUB_GROUP)) * MASTER, {}
    if zero.stage == 0:
        return trained * summed, 0 if summed == MASTER else trained * MASTER, {}
    beside = {"parameters to be copied": shard * width} if away else {}
    whole = trained * summed if zero.stage == 1 else 0  # until the backward pass ends
    if zero.widens_gradients:
        # What was summed is what is stepped with, unless it is copied to the host.
        stepping = shard * MASTER if away else 0
        if zero.stage == 1 and zero.precision == "bf16" and not away:
            return whole + trained * width, stepping, beside  # DeepSpeed's BF16_Optimizer
        return whole + shard * summed, stepping, beside
    stepping = shard * MASTER
    if not away:
        # Those of the step are made after the backward pass.
        return max(whole - stepping, shard * summed), stepping, beside
    # They go to the host as they are reduced; those of a micro-batch wait there for the others.
    if zero.stage == 2 and accumulated:
        beside["gradients"] = shard * summed
    return whole, stepping, beside


def activation_bytes(
    model: nn.Module, *, rows: int, length: int, target_length: int, width: int, recomputed: bool
) -> int:
    """Estimate what the forward pass keeps for the backward pass, and the logits.

    34 bytes a token, layer and unit of width at 16 bits (Korthikanti et al., arXiv 2205.05198, without
    the attention matrix, which fused attention does not keep); with recomputation 2, and one layer whole.
    A decoder's layer that also attends to an encoder keeps, by the same counts, 9 more a target token
    (normalized input, query, output, dropout's mask) and 4 a source token (its keys and values).

    Args:
        model: on the meta device.
        rows: of one micro-batch.
        length: tokens of one row; of its source, where there is an encoder and a decoder.
        target_length: tokens of a row's target; used where there is an encoder and a decoder.
        width: bytes of a number.
        recomputed: whether layers are recomputed in the backward pass.
    """
    settings: Any = cast(Any, model).config.get_text_config()
    hidden = int(settings.hidden_size)
    source = rows * length * hidden
    layers = [(int(settings.num_hidden_layers), 17 * source, source)]  # layers, numbers kept, input
    if settings.is_encoder_decoder:
        target = rows * target_length * hidden
        layers.append((num_decoder_layers(settings), (43 * target + 4 * source) // 2, target))
    if recomputed:
        kept = sum(number * given for number, _, given in layers) + max(k for _, k, _ in layers)
    else:
        kept = sum(number * inside for number, inside, _ in layers)
    logits = _num_logits(model, rows, length, target_length)
    return kept * width + 2 * logits * 4  # logits and their gradient, in float32


def distillation_bytes(
    model: nn.Module,
    distill: DistillConfig,
    *,
    rows: int,
    length: int,
    target_length: int,
    width: int,
) -> int:
    """Estimate what a teacher's outputs and the losses on them take before the backward pass.

    Args:
        model: that learns, on the meta device.
        distill: whether hidden states are distilled too.
        rows: of one micro-batch.
        length: tokens of one row; of its source, where there is an encoder and a decoder.
        target_length: tokens of a row's target; used where there is an encoder and a decoder.
        width: bytes of a number.
    """
    logits = _num_logits(model, rows, length, target_length)
    # The teacher's logits, those of both that count, and both models' log-probabilities in float32.
    kept = logits * (3 * width + 2 * 4)
    if distill.hidden_weight:
        settings: Any = cast(Any, model).config.get_text_config()
        states = rows * length * int(settings.num_hidden_layers) * int(settings.hidden_size)
        if settings.is_encoder_decoder:
            states += (
                rows * target_length * num_decoder_layers(settings) * int(settings.hidden_size)
            )
        kept += states * (width + 3 * 4)  # the teacher's; both normalized, and their difference
    return kept


def _num_logits(model: nn.Module, rows: int, length: int, target_length: int) -> int:
    settings: Any = cast(Any, model).config.get_text_config()
    if cast(Any, model).get_output_embeddings() is None:
        return rows * int(settings.num_labels)
    predicted = target_length if settings.is_encoder_decoder else length
    return rows * predicted * int(settings.vocab_size)


def num_decoder_layers(settings: Any) -> int:
    """Return the layers of a decoder beside an encoder, by the names BART's and T5's families have."""
    names = ("decoder_layers", "num_decoder_layers")
    return int(next(getattr(settings, n) for n in names if getattr(settings, n, None) is not None))


def bucket_bytes(zero: ZeroConfig, on_gpu: bool, total: int) -> int:
    """Return the buffers that reductions and gathers are made in."""
    bucket = zero.bucket_elements or default_bucket(on_gpu)
    width, summed = zero.dtype.itemsize, zero.gradient_dtype.itemsize
    turns = 2 if on_gpu else 1  # buffers that take turns where reductions overlap
    if zero.stage == 0:
        return 0
    if zero.stage == 3:
        reducing = bucket * summed * turns
    else:
        reducing = bucket * width * turns + (bucket * summed if zero.widens_gradients else 0)
    if zero.stage == 3:
        return reducing + gathered_bytes(zero, on_gpu, total)
    return reducing + min(bucket, total) * width


def gathered_bytes(zero: ZeroConfig, on_gpu: bool, total: int) -> int:
    """Return what parameters take that ZeRO 3 has gathered at once, at most."""
    bucket = zero.bucket_elements or default_bucket(on_gpu)
    return min(10 * bucket, total) * zero.dtype.itemsize
