"""The data stage: raw rows from files, a hub dataset, a function or several of them, tokenized once."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
from datasets import DatasetDict
from pydantic import Field, model_validator

from pipeline.data.sources import (
    AnySourceConfig,
    DataConfig,
    FilesConfig,
    FunctionConfig,
    HubConfig,
    load_source,
    renamed,
    root,
    source_identity,
)
from pipeline.errors import ConfigError
from pipeline.tasks import Task
from pipeline.tasks.base import num_tokens

VERSION = 2


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
                raise ValueError(
                    f"parts.{i}.{name} is of all parts together; give it as data.{name}"
                )
        return self


AnyDataConfig = Annotated[
    FilesConfig | HubConfig | FunctionConfig | JoinedConfig, Field(discriminator="source")
]


def prepare_data(config: Any, task: Task, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Tokenize all splits and write them with the tokenizer to `folder`.

    Returns:
        Rows and tokens by split, and what the model must know of the data (`model_kwargs`).
    """
    raw = load_splits(config)
    problems = missing_columns(config, task, raw)
    if problems:
        raise ConfigError(problems)
    tokenized = task.tokenize(raw, tokenizer, config.num_proc)
    tokenized.splits.save_to_disk(str(folder / "dataset"))
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return {
        "num_rows": {name: len(split) for name, split in tokenized.splits.items()},
        "num_tokens": {name: num_tokens(split) for name, split in tokenized.splits.items()},
        "model_kwargs": tokenized.model_kwargs,
    }


def num_training_examples(config: Any, task: Task, tokenizer: Any) -> int:
    """Return how many training examples the data stage will make; reads all rows.

    Raises:
        ConfigError: as `load_splits`.
    """
    return task.num_examples(load_splits(config)["train"], tokenizer, config.num_proc)


def is_local(config: Any) -> bool:
    """Return whether reading all rows takes no download."""
    parts = config.parts if config.source == "joined" else [config]
    return all(part.source != "hub" for part in parts)


def load_splits(config: Any, *, streaming: bool = False) -> DatasetDict:
    """Return the raw rows as `train`, `validation` and further validation sets by their names.

    Args:
        config: one of the data configurations.
        streaming: read lazily, for a look at the columns; nothing is split or cut then.

    Raises:
        ConfigError: if a file, a dataset or a split is not there or cannot be read.
    """
    if config.source == "joined":
        splits = renamed(_load_parts(config, streaming), config.rename)
    else:
        splits = load_source(config, streaming=streaming)
    if streaming:
        return splits
    if "validation" not in splits:
        num_rows = len(splits["train"])
        if not 1 <= math.ceil(num_rows * config.validation_share) < num_rows:
            raise ConfigError(
                [
                    f"data.validation_share: {config.validation_share} of {num_rows} training rows "
                    "leaves none to train or to validate on; give more rows or a validation split"
                ]
            )
        parts = splits["train"].train_test_split(config.validation_share, seed=config.split_seed)
        further = {name: split for name, split in splits.items() if name != "train"}
        splits = DatasetDict(train=parts["train"], validation=parts["test"], **further)
    return _cut(splits, config)


def _cut(splits: DatasetDict, config: Any) -> DatasetDict:
    """Leave out the rows beyond the numbers asked for."""
    cut = DatasetDict(splits)
    for name, split in splits.items():
        if name != "train":
            if config.max_validation_rows is not None:
                cut[name] = split.select(range(min(config.max_validation_rows, len(split))))
        elif config.max_train_rows is not None and config.max_train_rows < len(split):
            shuffled = split.shuffle(seed=config.split_seed)
            cut[name] = shuffled.select(range(config.max_train_rows))
    return cut


def _load_parts(config: JoinedConfig, streaming: bool) -> DatasetDict:
    """Return the parts' rows one after the other, split by split, with the columns all parts have."""
    loaded, problems = [], []
    for i, part in enumerate(config.parts):
        try:
            splits = load_source(part, streaming=streaming)
            loaded.append(splits if streaming else _cut(splits, part))
        except ConfigError as error:
            problems += [_in_part(i, problem) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    names = dict.fromkeys(name for splits in loaded for name in splits)
    columns = _common(split.column_names for splits in loaded for split in splits.values())
    joined = datasets.IterableDatasetDict() if streaming else DatasetDict()
    for name in names:
        pieces = [splits[name].select_columns(columns) for splits in loaded if name in splits]
        try:
            joined[name] = datasets.concatenate_datasets(pieces)
        except ValueError as error:  # columns of one name that hold different kinds of values
            raise ConfigError(
                [f"data.parts: the {name} rows of all parts cannot be joined: {root(error)}"]
            ) from error
    return joined


def _in_part(i: int, problem: str) -> str:
    return f"data.parts.{i}.{problem.removeprefix('data.')}"


def _common(column_names: Iterable[list[str]]) -> list[str]:
    """Return the columns that are in all lists, in the order of the first."""
    first, *others = column_names
    return [column for column in first if all(column in names for names in others)]


def missing_columns(config: Any, task: Task, splits: DatasetDict) -> list[str]:
    """Return a problem for each column the task needs that a split does not have."""
    of_all = "; of a joined source only the columns that all parts have count"
    hint = of_all if config.source == "joined" else ""
    return [
        f"{key}: column {column!r} is not in the {name} data; there are: "
        f"{sorted(split.column_names)}{hint}"
        for name, split in splits.items()
        for key, column in task.columns().items()
        if column not in split.column_names
    ]


def data_identity(config: Any) -> dict[str, Any]:
    """Return what names the data's content: checksums of files, a hub commit, a function's source.

    Raises:
        ConfigError: if a file or a function is not there.
    """
    if config.source != "joined":
        return source_identity(config)
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"num_proc", "parts"})
    values["parts"], problems = [], []
    for i, part in enumerate(config.parts):
        try:
            values["parts"].append(source_identity(part))
        except ConfigError as error:
            problems += [_in_part(i, problem) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return values
