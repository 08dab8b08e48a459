"""What a column of labels must hold: classes that are learned, or numbers."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Json, Value

from pipeline.errors import ConfigError, Problem

_ROWS_AT_A_TIME = 100_000
_SHOWN = 5  # labels that a message lists
_LARGEST = 2.0**64  # of a number to predict: the loss squares it, in float32


def named_classes(splits: DatasetDict, column: str) -> tuple[list[str], dict[Any, int]]:
    """Return the names of the classes in order, and the number of each raw label.

    Raises:
        ConfigError: if a label is missing or of another kind, a split numbers its classes otherwise, or
            has one that training has not, or there is only one.
    """
    feature = splits["train"].features[column]
    _refuse_missing(splits, column)
    _refuse_kinds(splits, column)
    _refuse_other_names(splits, column)
    found = {name: set(split.unique(column)) for name, split in splits.items()}
    _refuse_unlabelled(found, column)
    values = sorted(found["train"])
    if isinstance(feature, ClassLabel):
        names, index = feature.names, {i: i for i in range(feature.num_classes)}
    else:
        names, index = [str(value) for value in values], {v: i for i, v in enumerate(values)}
    unseen = sorted(set().union(*found.values()) - found["train"])
    if unseen or len(values) < 2:
        shown = [_called(feature, value) for value in unseen[:_SHOWN]]
        more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
        only = [names[index[value]] for value in values if value in index]
        why = f"unseen in training: {shown}{more}" if unseen else f"only {only}"
        raise ConfigError(
            [
                Problem(
                    "task.label",
                    f"column {column!r} needs at least two labels, all in training; {why}",
                )
            ]
        )
    return names, index


def refuse_no_numbers(splits: DatasetDict, column: str) -> None:
    """Check that a column holds numbers that a model can be trained to predict.

    Raises:
        ConfigError: if one is missing, not finite or too large, or is no number.
    """
    _refuse_missing(splits, column)
    for name, split in splits.items():
        feature = split.features[column]
        if not (isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float"))):
            raise ConfigError(
                [
                    Problem(
                        "task.label",
                        f"column {column!r} of {name} holds {feature}",
                        hint="regression needs numbers",
                    )
                ]
            )
        for chunk in _chunks(split, column):
            numbers = chunk.cast(pa.float64())
            _refuse_where(pc.invert(pc.is_finite(numbers)), numbers, column, name, "not finite")
            large = pc.greater_equal(pc.abs(numbers), _LARGEST)
            _refuse_where(large, numbers, column, name, "too large for float32 once squared")


def _refuse_where(wrong: Any, numbers: Any, column: str, name: str, why: str) -> None:
    if pc.any(wrong).as_py():
        raise ConfigError(
            [
                Problem(
                    "task.label",
                    f"column {column!r} of {name} holds numbers that are {why}",
                    got=pc.filter(numbers, wrong)[0].as_py(),
                )
            ]
        )


def _refuse_other_names(splits: DatasetDict, column: str) -> None:
    """Refuse classes that a split numbers otherwise than the training rows do.

    Classes without names are taken to have the numbers of the others.
    """
    of_train = splits["train"].features[column]
    for name, split in splits.items():
        feature = split.features[column]
        both = isinstance(of_train, ClassLabel) and isinstance(feature, ClassLabel)
        if both and feature.names != of_train.names:
            raise ConfigError(
                [
                    Problem(
                        "task.label",
                        f"the classes of column {column!r} are {feature.names} in the {name} data and "
                        f"{of_train.names} in the train data, numbered from 0",
                        hint="give all splits the same ones in one order",
                    )
                ]
            )


def _called(feature: Any, value: Any) -> Any:
    """Return a label as people know it: the name of a class that has one."""
    named = isinstance(feature, ClassLabel) and 0 <= value < feature.num_classes
    return feature.names[value] if named else value


def _refuse_kinds(splits: DatasetDict, column: str) -> None:
    """Refuse labels of a kind that names no classes, and of another kind than in training."""
    kinds = {name: _kind(split.features[column]) for name, split in splits.items()}
    for name, kind in kinds.items():
        if kind is None:
            feature = splits[name].features[column]
            held = "values of several types" if isinstance(feature, Json) else feature
            raise ConfigError(
                [
                    Problem(
                        "task.label",
                        f"column {column!r} of {name} holds {held}",
                        hint="classification needs whole numbers or text",
                    )
                ]
            )
        if kind != kinds["train"]:
            raise ConfigError(
                [
                    Problem(
                        "task.label",
                        f"column {column!r} holds {kinds['train']} in the train data and {kind} in "
                        f"the {name} data",
                    )
                ]
            )


def _kind(feature: Any) -> str | None:
    """Return what a column of classes holds, in words; None if that cannot be classes."""
    if isinstance(feature, ClassLabel):
        return "whole numbers"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    kinds = {"string": "text", "large_string": "text", "bool": "booleans"}
    return "whole numbers" if dtype.startswith(("int", "uint")) else kinds.get(dtype)


def _refuse_unlabelled(found: dict[str, set[Any]], column: str) -> None:
    """Refuse -1, which marks rows whose label is not known, unless the classes are -1 and 1."""
    for name, values in found.items():
        if -1 in values and set().union(*found.values()) != {-1, 1}:
            raise ConfigError(
                [
                    Problem(
                        "task.label",
                        f"column {column!r} of the {name} data has -1, which marks rows without a label",
                        hint="leave these rows out, or give the class another number",
                    )
                ]
            )


def _chunks(split: Dataset, column: str) -> Iterator[pa.ChunkedArray]:
    for table in split.select_columns(column).with_format("arrow").iter(_ROWS_AT_A_TIME):
        yield table[column]


def _refuse_missing(splits: DatasetDict, column: str) -> None:
    for name, split in splits.items():
        missing = sum(chunk.null_count for chunk in _chunks(split, column))
        if missing:
            raise ConfigError(
                [
                    Problem(
                        "task.label",
                        f"{missing} rows of the {name} data have no value in column {column!r}",
                    )
                ]
            )
