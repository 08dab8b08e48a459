"""Weights that a batch may pass over: of experts that are modules of their own, of layers left out.

Workers see other batches, so they pass over other weights, and gathering and reducing these would not
match. Stacks of experts (parameters of three dimensions) are used as a whole and need none of this.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import Problem

_EXPERTS = re.compile(r"(^|_)experts?$", re.IGNORECASE)
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def gather_experts_whole(model: nn.Module) -> None:
    """Let ZeRO 3 gather and reduce all experts of a layer together, whichever a batch is routed to.

    Call it before `deepspeed.initialize`.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in _routing_modules(model):
        set_z3_leaf_module(module, True)
        module.register_forward_pre_hook(_require_gradient)


def passed_over_problems(model: PreTrainedModel, stage: int, num_workers: int) -> list[Problem]:
    """Return what of a model cannot be trained so, because workers would pass over other weights.

    Args:
        model: on the meta device is enough.
        stage: of ZeRO.
        num_workers: that train it.
    """
    if num_workers == 1 or stage == 0:
        return []
    found = [
        Problem(
            f"model.overrides.{name}",
            f"ZeRO {stage} cannot train layers that each worker leaves out at random",
            got=getattr(model.config, name),
            hint="set it to 0.0, or use zero.stage: 0",
        )
        for name in _LAYER_DROPS
        if getattr(model.config, name, 0)
    ]
    routing = next(_routing_modules(model), None)
    if routing is not None and stage != 3:
        found.append(
            Problem(
                "zero.stage",
                f"the experts of {type(routing).__name__} are modules of their own, of which each worker "
                f"trains others in a step: ZeRO {stage} cannot reduce their gradients",
                got=stage,
                hint="use zero.stage: 3, or 0",
            )
        )
    return found


def _routing_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that choose among experts which are modules of their own."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        parent, _, name = path.rpartition(".")
        if _EXPERTS.search(name) or _EXPERTS.search(type(module).__name__):
            calls_itself = type(module).forward is not nn.Module.forward
            yield module if calls_itself else modules[parent]


def _require_gradient(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    """Let the inputs have a gradient: DeepSpeed reduces the experts' when it is computed."""
    if not torch.is_grad_enabled():
        return args
    return tuple(
        value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        else value
        for value in args
    )
