"""The labels of a head: its rows in the order of the data's, its names as the model has them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError, Problem
from pipeline.models.checkpoint_check import gathered

_SHOWN = 5  # labels that a message lists


def follow_labels(
    model: Any, before: Any, labels: dict[int, str], notify: Callable[[str], None]
) -> None:
    """Put the rows of a head into the order of the data's labels, which are named as the model does.

    Where no name is the same, rows stay as they are; the names do too where the data has only numbers.

    Args:
        model: with its head, for as many labels as the data has.
        before: the configuration it was saved with.
        labels: the data's names by number.
        notify: called with a note where labels are matched by number.

    Raises:
        ConfigError: if only some of the names are the same, or there are no rows to reorder.
    """
    known, wanted = names_of(before.id2label), names_of(labels)
    order = label_order(known, wanted)
    if order is None:
        only_numbers = wanted == [str(i) for i in range(len(wanted))]
        if len(known) != len(wanted) or (only_numbers and _is_unnamed(known)):
            return
        notify(_by_number(known, wanted))
        if not only_numbers:
            return
        order = list(range(len(known)))
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


def names_of(id2label: dict[int, str]) -> list[str]:
    """Return the names of labels in the order of their numbers."""
    return [str(id2label[i]) for i in sorted(id2label)]


def label_order(known: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the number in `known` of each label wanted, by name; None if no name is the same.

    Names are the same but for capitals and spaces, unless that makes two of them one.

    Raises:
        ConfigError: if there are as many, of which some are the same and others not.
    """
    if len(known) != len(wanted):
        return None
    distinct = all(len({*map(_folded, names)}) == len(names) for names in (known, wanted))
    fold = _folded if distinct else str
    ours, theirs = [fold(name) for name in wanted], [fold(name) for name in known]
    if set(ours) == set(theirs):
        return [theirs.index(name) for name in ours]
    if not set(ours) & set(theirs):
        return None
    lacking, further = (
        [name for name in names if fold(name) not in others][:_SHOWN]
        for names, others in ((known, ours), (wanted, theirs))
    )
    raise ConfigError(
        [
            Problem(
                "task.label",
                f"the model's head has the labels {lacking} where the data has {further}; all others are "
                "the same",
                hint="give the data's labels the model's names, or start from a model without this head",
            )
        ]
    )


def _folded(name: str) -> str:
    return " ".join(name.split()).casefold()


def _is_unnamed(names: Sequence[str]) -> bool:
    """Return whether these are the names that transformers gives labels without one."""
    return list(names) == [f"LABEL_{i}" for i in range(len(names))]


def _by_number(known: Sequence[str], wanted: Sequence[str]) -> str:
    pairs = [f"{ours!r} for {theirs!r}" for ours, theirs in zip(wanted, known, strict=True)]
    more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    shown = ", ".join(pairs[:_SHOWN])
    return f"labels of the data are taken for the model's by number: {shown}{more}"


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
