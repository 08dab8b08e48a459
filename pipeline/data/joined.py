"""Rows of several sources, one after the other."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import datasets
from datasets import DatasetDict, Value
from pydantic import Field, model_validator

from pipeline.data.base import NOTHING_AS_WRITTEN, AsWritten, DataConfig, root
from pipeline.data.registry import AnySourceConfig, load_source, source_identity
from pipeline.errors import ConfigError, Problem, SettingError


class JoinedConfig(DataConfig):
    """Several sources, their rows one after the other; columns that not all have are left out.

    A part without a validation split adds training rows alone; where no part has one, a share of
    all training rows is held out.
    """

    source: Literal["joined"]
    parts: Annotated[list[AnySourceConfig], Field(min_length=1)]
    """The sources, each with settings of its own (`rename`, `max_train_rows`, ...)."""

    @model_validator(mode="after")
    def _check(self) -> "JoinedConfig":
        for i, part in enumerate(self.parts):
            misplaced = part.model_fields_set & {"validation_share", "split_seed", "num_proc"}
            if misplaced:
                name = min(misplaced)
                raise SettingError(
                    Problem(
                        f"parts.{i}.{name}",
                        "is of all parts together",
                        hint=f"give it as data.{name}",
                    )
                )
        return self


def load_joined(
    config: JoinedConfig,
    streaming: bool,
    as_written: AsWritten = NOTHING_AS_WRITTEN,
    identity: Mapping[str, Any] | None = None,
) -> DatasetDict:
    """Return the parts' rows one after the other, split by split, with the columns all parts have.

    The rows must be those that `identity` names, if it is given.
    """
    loaded, problems = [], []
    identities = identity["parts"] if identity is not None else [None] * len(config.parts)
    for i, part in enumerate(config.parts):
        try:
            inner = as_written.before(config.rename)
            splits = load_source(
                part, streaming=streaming, as_written=inner, identity=identities[i]
            )
            loaded.append(splits if streaming else limited(splits, part))
        except ConfigError as error:
            problems += [_in_part(i, problem) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    names = dict.fromkeys(name for splits in loaded for name in splits)
    columns = _common(split.column_names for splits in loaded for split in splits.values())
    joined = datasets.IterableDatasetDict() if streaming else DatasetDict()
    for name in names:
        parts = [
            _one_text(splits[name].select_columns(columns)) for splits in loaded if name in splits
        ]
        try:
            joined[name] = datasets.concatenate_datasets(parts)
        except ValueError as error:  # columns of one name that hold different kinds of values
            raise ConfigError(
                [
                    Problem(
                        "data.parts",
                        f"the {name} rows of all parts cannot be joined: {root(error)}",
                    )
                ]
            ) from error
    return joined


def identify_joined(config: JoinedConfig) -> dict[str, Any]:
    """Return what names the rows' content: the settings, and what names each part's.

    Raises:
        ConfigError: if a file or a function is not there.
    """
    values: dict[str, Any] = config.given()
    values["parts"], problems = [], []
    for i, part in enumerate(config.parts):
        try:
            values["parts"].append(source_identity(part))
        except ConfigError as error:
            problems += [_in_part(i, problem) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return values


def limited(splits: DatasetDict, config: Any) -> DatasetDict:
    """Return the splits without the rows beyond `max_train_rows` and `max_validation_rows`."""
    cut = DatasetDict(splits)
    for name, split in splits.items():
        if name != "train":
            if config.max_validation_rows is not None:
                cut[name] = split.select(range(min(config.max_validation_rows, len(split))))
        elif config.max_train_rows is not None and config.max_train_rows < len(split):
            shuffled = split.shuffle(seed=config.split_seed)
            cut[name] = shuffled.select(range(config.max_train_rows))
    return cut


def _one_text(split: Any) -> Any:
    """Return a split with one type of text, of the two that readers make of the same files."""
    for name, feature in split.features.items():
        if feature == Value("large_string"):
            split = split.cast_column(name, Value("string"))
    return split


def _in_part(i: int, problem: Problem) -> Problem:
    return replace(
        problem,
        key=f"data.parts.{i}{problem.key.removeprefix('data')}",
        hint=problem.hint.replace("data.revision", f"data.parts.{i}.revision"),
    )


def _common(column_names: Iterable[list[str]]) -> list[str]:
    """Return the columns that are in all lists, in the order of the first."""
    first, *others = column_names
    return [column for column in first if all(column in names for names in others)]
