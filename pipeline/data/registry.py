"""The sources of rows by name: how each is loaded, and what names its content.

A source is one file (its section, a function that loads it, one that identifies it) and an entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from datasets import DatasetDict
from pydantic import Field

from pipeline.data.base import NOTHING_AS_WRITTEN, AsWritten
from pipeline.data.files import FilesConfig, confirm_files, identify_files, load_files
from pipeline.data.function import (
    FunctionConfig,
    confirm_function,
    identify_function,
    load_function,
)
from pipeline.data.hub import HubConfig, confirm_hub, identify_hub, load_hub
from pipeline.errors import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class Source:
    """What can be done with a source, given its section.

    Attributes:
        load: reads the raw rows by split; its second argument asks for lazy reading, its third
            names the columns that stay as they are written.
        identity: what names the rows' content, for the key of the data stage.
        confirm: refuses rows that were read, if they are not those that an identity names.
    """

    load: Callable[[Any, bool, AsWritten], DatasetDict]
    identity: Callable[[Any], dict[str, Any]]
    confirm: Callable[[Any, DatasetDict, Mapping[str, Any]], None]


SOURCES = {
    "files": Source(load=load_files, identity=identify_files, confirm=confirm_files),
    "hub": Source(load=load_hub, identity=identify_hub, confirm=confirm_hub),
    "function": Source(load=load_function, identity=identify_function, confirm=confirm_function),
}
AnySourceConfig = Annotated[FilesConfig | HubConfig | FunctionConfig, Field(discriminator="source")]


def load_source(
    config: Any,
    *,
    streaming: bool = False,
    as_written: AsWritten = NOTHING_AS_WRITTEN,
    identity: Mapping[str, Any] | None = None,
) -> DatasetDict:
    """Return a source's raw rows, columns renamed: `train`, what there is of `validation`, further sets.

    Args:
        config: of files, the hub or a function.
        streaming: read lazily, for a look at the columns.
        as_written: columns by what they are called after renaming.
        identity: what the rows must be, as `source_identity` gave it.

    Raises:
        ConfigError: if a file, a dataset or a split is not there or cannot be read, or rows are not those
            that `identity` names.
    """
    source = SOURCES[config.source]
    splits = source.load(config, streaming, as_written.before(config.rename))
    if identity is not None:
        source.confirm(config, splits, identity)
    return renamed(splits, config.rename)


def renamed(splits: DatasetDict, rename: dict[str, str]) -> DatasetDict:
    """Return the splits with columns renamed, wherever they occur.

    Raises:
        ConfigError: if a split has a column of the new name already.
    """
    return type(splits)({name: _renamed(name, split, rename) for name, split in splits.items()})


def source_identity(config: Any) -> dict[str, Any]:
    """Return what names the rows' content: checksums of files or of a function's rows, a hub commit."""
    return SOURCES[config.source].identity(config)


def _renamed(name: str, split: Any, rename: dict[str, str]) -> Any:
    columns = list(split.column_names)
    present = {old: new for old, new in rename.items() if old in columns}
    kept = [column for column in columns if column not in present]
    taken = [
        new for new in present.values() if new in kept or list(present.values()).count(new) > 1
    ]
    if taken:
        raise ConfigError(
            [
                Problem(
                    "data.rename",
                    f"{name} data has a column {taken[0]!r} already; there are: {columns}",
                )
            ]
        )
    return split.rename_columns(present) if present else split
