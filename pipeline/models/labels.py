"""The labels of a head: its rows in the order of the data's, its names as the model has them."""

from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError, Problem
from pipeline.models.checkpoint_check import gathered


def follow_labels(model: Any, before: Any, labels: dict[int, str]) -> None:
    """Put the rows of a head into the order of the data's labels, which are named as the model does.

    Args:
        model: with its head, for as many labels as the data has.
        before: the configuration it was saved with.
        labels: the data's names by number.
    """
    known = [str(before.id2label[i]) for i in sorted(before.id2label)]
    wanted = [str(labels[i]) for i in sorted(labels)]
    folded = [name.casefold() for name in known]
    numbers = [str(i) for i in range(len(wanted))]
    if wanted == numbers and len(known) == len(wanted):
        order = list(range(len(known)))  # numbers say which row, and no name
        if known == [f"LABEL_{i}" for i in order]:
            return
    elif len(set(folded)) == len(folded) and sorted(folded) == sorted(n.casefold() for n in wanted):
        order = [folded.index(name.casefold()) for name in wanted]
    else:
        return
    if order != sorted(order) and not _reorder_head(model, order):
        raise ConfigError(
            [
                Problem(
                    "task.label",
                    f"the model's labels are {known}, the data's {wanted}, and its head has no layer "
                    "whose rows are labels",
                )
            ]
        )
    names = {i: known[old] for i, old in enumerate(order)}
    model.config.id2label = names
    model.config.label2id = {name: i for i, name in names.items()}


def _reorder_head(model: Any, order: list[int]) -> bool:
    """Put the rows of the last layer of a head into another order; False if there is no such layer.

    Under ZeRO 3 the layer is gathered, so all workers must call.

    Args:
        model: with a head for as many labels.
        order: the old row of each new one.
    """
    inside = {id(module) for module in model.base_model.modules()} - {id(model)}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.out_features == len(order)
        and id(module) not in inside
    ]
    if not layers:
        return False
    parameters = list(layers[-1].parameters())
    with gathered(parameters, modified=True), torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.detach()[order].clone())
    return True
