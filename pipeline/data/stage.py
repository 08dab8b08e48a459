"""The data stage: raw rows from files, a hub dataset, a function or several of them, tokenized once."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from datasets import DatasetDict
from pydantic import Field

from pipeline.data.base import NOTHING_AS_WRITTEN, AsWritten
from pipeline.data.checks import empty_problems, text_problems
from pipeline.data.hub import pinned_hub
from pipeline.data.joined import JoinedConfig, identify_joined, limited, load_joined
from pipeline.data.registry import AnySourceConfig, load_source, renamed, source_identity
from pipeline.data.unknown_tokens import unknown_problems
from pipeline.errors import ConfigError, Problem
from pipeline.tasks import Task
from pipeline.tasks.base import num_tokens
from pipeline.tasks.row_mapper import IN_MEMORY, RowMapper

AnyDataConfig = Annotated[AnySourceConfig | JoinedConfig, Field(discriminator="source")]


def prepare_data(
    config: Any,
    task: Task,
    tokenizer: Any,
    folder: Path,
    identity: Mapping[str, Any] | None = None,
    mapper: RowMapper = IN_MEMORY,
) -> dict[str, Any]:
    """Tokenize all splits and write them with the tokenizer to `folder`.

    Args:
        config: one of the data configurations.
        task: what the rows are for.
        tokenizer: the model's.
        folder: what is written to.
        identity: what the rows must be, as `data_identity` gave it for the stage's key.
        mapper: what maps the rows.

    Returns:
        Rows and tokens by split, and what the model must know of the data (`model_kwargs`).

    Raises:
        ConfigError: if the rows are not what the task needs, or not those that `identity` names.
    """
    raw = load_splits(config, task, identity=identity)
    unknown = unknown_problems(raw["train"], list(task.text_columns().values()), tokenizer)
    if unknown:
        raise ConfigError(unknown)
    # Before it cuts rows: from then on it writes itself with their length.
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    tokenized = task.tokenize(raw, tokenizer, mapper)
    tokenized.splits.save_to_disk(str(folder / "dataset"))
    return {
        "num_rows": {name: len(split) for name, split in tokenized.splits.items()},
        "num_tokens": {name: num_tokens(split) for name, split in tokenized.splits.items()},
        "model_kwargs": tokenized.model_kwargs,
    }


def is_local(config: Any) -> bool:
    """Return whether reading all rows takes no download."""
    parts = config.parts if config.source == "joined" else [config]
    return all(part.source != "hub" or Path(part.path).is_dir() for part in parts)


def load_splits(
    config: Any,
    task: Task | None = None,
    *,
    streaming: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> DatasetDict:
    """Return the raw rows as `train`, `validation` and further validation sets by their names.

    Args:
        config: one of the data configurations.
        task: what the rows are for; they are checked to be what it needs.
        streaming: read lazily, for a look at the columns; nothing is split or cut then.
        identity: what the rows must be, as `data_identity` gave it.

    Raises:
        ConfigError: if a file, a dataset or a split is not there or cannot be read, or rows are not
            what the task needs, or not those that `identity` names.
    """
    as_written = NOTHING_AS_WRITTEN
    if task is not None:
        text = list(task.text_columns().values())
        as_written = AsWritten(text=text, labels=task.label_columns())
    if config.source == "joined":
        before = as_written.before(config.rename)
        splits = renamed(load_joined(config, streaming, before, identity), config.rename)
    else:
        splits = load_source(config, streaming=streaming, as_written=as_written, identity=identity)
    if streaming:
        return splits
    problems = empty_problems(splits)
    if task is not None and not problems:
        problems = missing_columns(config, task, splits)
        problems = problems or text_problems(splits, task.text_columns(), task.optional_columns())
    if problems:
        raise ConfigError(problems)
    if "validation" not in splits:
        num_rows = len(splits["train"])
        if not 1 <= math.ceil(num_rows * config.validation_share) < num_rows:
            raise ConfigError(
                [
                    Problem(
                        "data.validation_share",
                        f"{config.validation_share} of {num_rows} training rows leaves none to train or "
                        "to validate on",
                        hint="give more rows or a validation split",
                    )
                ]
            )
        parts = splits["train"].train_test_split(config.validation_share, seed=config.split_seed)
        further = {name: split for name, split in splits.items() if name != "train"}
        splits = DatasetDict(train=parts["train"], validation=parts["test"], **further)
    splits = limited(splits, config)
    if task is not None:
        task.check(splits)
    return splits


def missing_columns(config: Any, task: Task, splits: DatasetDict) -> list[Problem]:
    """Return a problem for each column the task needs that a split does not have."""
    of_all = "of a joined source only the columns that all parts have count"
    hint = of_all if config.source == "joined" else ""
    return [
        Problem(
            key,
            f"column {column!r} is not in the {name} data; there are: {sorted(split.column_names)}",
            hint=hint,
        )
        for name, split in splits.items()
        for key, column in task.columns().items()
        if column not in split.column_names
    ]


def data_identity(config: Any) -> dict[str, Any]:
    """Return what names the data's content: checksums of files or of a function's rows, a hub commit.

    Raises:
        ConfigError: if a file or a function is not there.
    """
    return identify_joined(config) if config.source == "joined" else source_identity(config)


def pinned_data(config: Any) -> Any:
    """Return the data's configuration with the commits that revisions of hub datasets stand for."""
    if config.source == "joined":
        return config.model_copy(update={"parts": [pinned_data(part) for part in config.parts]})
    return pinned_hub(config) if config.source == "hub" else config
