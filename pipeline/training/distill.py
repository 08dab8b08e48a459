"""Distillation: what a model that is pruned learns from a dense teacher, and by which losses."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from pipeline.errors import Problem, SettingError
from pipeline.models.source import ModelConfig
from pipeline.section import Section

DENSE = "dense"


class DistillConfig(Section):
    """Distillation from a dense teacher as the model is pruned; the dense fine-tune has none."""

    teacher: str = DENSE
    """`dense`, this run's own dense fine-tune, or a model fine-tuned for the task: name on the hub,
    folder (`./dense` if it has that name) or `package:NAME/inner/folder`."""
    revision: str | None = None
    """Branch, tag or commit of a teacher on the hub."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teacher's outputs in the loss; the rest is the task's own."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """What both models' logits are divided by; regression has no logits and takes no notice."""
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance between hidden states, layer by layer; needs the same depth and width."""

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if not self.weight and not self.hidden_weight:
            raise SettingError(
                Problem("weight", "with hidden_weight 0 too, a teacher would teach nothing", got=0)
            )
        if self.revision is not None and self.teacher == DENSE:
            raise SettingError(
                Problem("revision", "is for a teacher on the hub", got=self.revision)
            )
        return self

    def model(self, student: ModelConfig) -> ModelConfig | None:
        """Return the teacher as a model, None for the dense fine-tune, which only the run can find.

        What `student` says of code and attention holds for its teacher too.
        """
        if self.teacher == DENSE:
            return None
        return ModelConfig(
            path=self.teacher,
            revision=self.revision,
            trust_remote_code=student.trust_remote_code,
            attention=student.attention,
        )


def soft_target_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of softmax(logits / T), the mean over predictions.

    Hinton et al., arXiv 1503.02531: gradients through logits / T shrink by T^2, which the factor makes
    up for. In float32 whatever the models' precision.

    Args:
        student: logits, [predictions, choices].
        teacher: logits, the same shape; no gradient is taken of them.
        temperature: T.

    Returns:
        Nats, a scalar; 0 where nothing is predicted.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(student, teacher)
    of_student = functional.log_softmax(_float(student) / temperature, dim=-1)
    of_teacher = functional.log_softmax(_float(teacher.detach()) / temperature, dim=-1)
    total = functional.kl_div(of_student, of_teacher, reduction="sum", log_target=True)
    return total * (temperature**2 / max(len(student), 1))


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error between outputs that are numbers, [predictions, numbers]; float32.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(student, teacher)
    return functional.mse_loss(_float(student), _float(teacher.detach()))


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the squared distance between normalized hidden states, the mean over layers and tokens.

    |h / |h| - h' / |h'||^2 as in patient distillation (arXiv 1908.09355), but of every layer and token
    as in TinyBERT (arXiv 1909.10351), not of [CLS] in some layers. In float32.

    Args:
        student: hidden states, one [rows, tokens, width] a layer.
        teacher: the same; no gradient is taken of them.
        mask: [rows, tokens], not 0 where a token counts.

    Returns:
        A scalar from 0 to 4; 0 where no token counts.

    Raises:
        ValueError: if the numbers of layers or the shapes differ.
    """
    shapes = [[tuple(layer.shape) for layer in model] for model in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the student's hidden states are {shapes[0]}, the teacher's {shapes[1]}; "
            "they must be of the same depth and width"
        )
    counted = mask.bool()
    # What does not count is left out before it is normalized: it may be anything, also not finite.
    distances = [
        (_unit(of_student[counted]) - _unit(of_teacher.detach()[counted])).square().sum(dim=-1)
        for of_student, of_teacher in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).sum() / max(len(distances) * len(distances[0]), 1)


def _unit(states: Tensor) -> Tensor:
    return functional.normalize(_float(states), dim=-1)


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's outputs are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        )
