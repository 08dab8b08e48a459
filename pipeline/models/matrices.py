"""The matrices of a layer, one by one: those of linear projections, and each of a stack of experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """A matrix that is pruned by itself.

    Attributes:
        weight: full name of the parameter that holds it.
        module: whose parameter that is.
        attribute: the parameter's name in the module.
        expert: which of a stack of experts' it is; None of a linear projection.
    """

    weight: str
    module: nn.Module
    attribute: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """The parameter's name, with the expert's number."""
        return self.weight if self.expert is None else f"{self.weight}[{self.expert}]"

    def stored(self) -> Tensor:
        """Return it as it is stored, a view without gradient."""
        whole = self.module.get_parameter(self.attribute).detach()
        return whole if self.expert is None else whole[self.expert]

    def rows(self) -> Tensor:
        """Return it as [out, in], a view."""
        return self.oriented(self.stored())

    def oriented(self, tensor: Tensor) -> Tensor:
        """Turn what lies as it is stored to [out, in], or back."""
        if self.expert is None:
            return tensor if isinstance(self.module, nn.Linear) else tensor.T  # `Conv1D` of GPT-2
        return tensor.T if self.module.is_transposed else tensor


def matrices_of(weight: str, module: nn.Module) -> list[Matrix]:
    """Return the matrices of a parameter.

    Args:
        weight: its full name.
        module: that holds it.

    Raises:
        ValueError: if it is the weight of no linear projection and no stack of experts whose inputs
            are known.
    """
    attribute = weight.rpartition(".")[2]
    is_projection = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    if is_projection and attribute == "weight":
        return [Matrix(weight=weight, module=module, attribute=attribute)]
    if _runs_experts(module) and attribute in (_first(module), "down_proj"):
        numbers = range(len(module.get_parameter(attribute)))
        return [
            Matrix(weight=weight, module=module, attribute=attribute, expert=n) for n in numbers
        ]
    raise ValueError(
        f"{weight} is not the weight of a linear projection or of experts that transformers runs one "
        f"by one, but of {type(module).__name__}; leave it alone (prune.exclude: ['{weight}'])"
    )


@torch.no_grad()
def expert_inputs(
    module: Any, hidden: Tensor, chosen: Tensor
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield for each expert what its matrices multiply, of the tokens that are routed to it.

    Args:
        module: the stack of experts.
        hidden: hidden states, [tokens, width].
        chosen: experts of each token, [tokens, experts a token].

    Yields:
        The expert's number, and by parameter [its tokens, in].
    """
    first = _first(module)
    for expert in range(len(module.down_proj)):
        states = hidden[(chosen == expert).any(dim=-1)]
        weight = module.get_parameter(first)[expert]
        outputs = states @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            outputs = outputs + module.get_parameter(f"{first}_bias")[expert]
        # As transformers' own functions for experts do (transformers/integrations/moe.py).
        inner = module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)
        yield expert, {first: states, "down_proj": inner}


def _runs_experts(module: nn.Module) -> bool:
    """Tell whether transformers' registry of experts' functions runs the module."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"
