"""Rows of a function of the user's."""

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import Annotated, Any, Literal

import pyarrow as pa
from datasets import Dataset, DatasetDict
from pydantic import Field

from pipeline.data.base import NOTHING_AS_WRITTEN, AsWritten, DataConfig, SetName, root
from pipeline.errors import ConfigError, Problem

_ROWS_AT_A_TIME = 10_000
_FOR_VALIDATION = ("val", "dev", "eval")  # how names of splits begin that are meant for it


class FunctionConfig(DataConfig):
    """A function that returns a `datasets.DatasetDict` with a `train` split, and may with `validation`.

    It must return the same rows at each call and in each process; splits of other names are not used
    unless `extra_validation` names them.
    """

    source: Literal["function"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, importable on every node."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""
    extra_validation: dict[SetName, str] = {}
    """Further splits to score on: name -> split returned. Their metrics are called `name/metric`."""


def load_function(
    config: FunctionConfig, streaming: bool, as_written: AsWritten = NOTHING_AS_WRITTEN
) -> DatasetDict:
    """Return the rows that the function returns, by split; it has no other way than to make all.

    Raises:
        ConfigError: if it cannot be imported or called so, or returns something else, such as rows for
            validation under another name.
    """
    returned = _returned(config)
    if not isinstance(returned, DatasetDict) or "train" not in returned:
        raise ConfigError(
            [
                Problem(
                    "data.function",
                    f"{config.function} must return a DatasetDict with a 'train' split",
                    got=_form(returned),
                )
            ]
        )
    for name, split in returned.items():
        if not isinstance(split, Dataset):
            raise ConfigError(
                [
                    Problem(
                        "data.function",
                        f"{config.function} must return splits of datasets.Dataset",
                        got=f"{name}: {type(split).__name__}",
                    )
                ]
            )
    splits = DatasetDict({k: returned[k] for k in ("train", "validation") if k in returned})
    for name, split in config.extra_validation.items():
        if split not in returned:
            raise ConfigError(
                [
                    Problem(
                        f"data.extra_validation.{name}",
                        f"{config.function} returns no split {split!r}; there are: {sorted(returned)}",
                    )
                ]
            )
        splits[name] = returned[split]
    _refuse_passed_over(config, set(returned))
    return splits


def identify_function(config: FunctionConfig) -> dict[str, Any]:
    """Return what names the rows' content: the settings, and a checksum of the rows it returns."""
    values: dict[str, Any] = config.given()
    values["rows_sha256"] = _rows_sha256(load_function(config, streaming=False))
    return values


def confirm_function(
    config: FunctionConfig, splits: DatasetDict, identity: Mapping[str, Any]
) -> None:
    """Check that a function returned the rows that the run's keys were made of.

    Raises:
        ConfigError: if it did not.
    """
    if _rows_sha256(splits) != identity["rows_sha256"]:
        raise ConfigError(
            [
                Problem(
                    "data.function",
                    f"{config.function} returned other rows than when the run's keys were made",
                    hint="let it return the same rows at each call and in each process: seed what it "
                    "draws",
                )
            ]
        )


def _refuse_passed_over(config: FunctionConfig, names: set[str]) -> None:
    """Refuse a split that seems to be for validation but is not called so, where none is."""
    meant = sorted(
        name
        for name in names - set(config.extra_validation.values())
        if name.casefold().startswith(_FOR_VALIDATION)
    )
    if meant and "validation" not in names:
        raise ConfigError(
            [
                Problem(
                    "data.function",
                    f"{config.function} returns no split 'validation' but {meant[0]!r}",
                    hint="call it 'validation', name it in data.extra_validation, or leave it out: a "
                    "share of the training rows is held out then",
                )
            ]
        )


def _returned(config: FunctionConfig) -> Any:
    """Call the function; what it returns may be of any kind, for it is the user's."""
    function = _function(config)
    try:
        return function(**config.arguments)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            [Problem("data.function", f"{config.function} raised {root(error)}")]
        ) from error


def _form(returned: Any) -> str:
    kind = type(returned).__name__
    return f"{kind} of {sorted(map(str, returned))}" if isinstance(returned, dict) else kind


def _rows_sha256(splits: DatasetDict) -> str:
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        digest.update(f"{name}\0{split.features}\0{len(split)}\0".encode())
        for table in split.with_format("arrow").iter(_ROWS_AT_A_TIME):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
                writer.write_table(table.combine_chunks().replace_schema_metadata())
            digest.update(sink.getvalue())
    return digest.hexdigest()


def _function(config: FunctionConfig) -> Callable[..., Any]:
    module, _, name = config.function.partition(":")
    try:
        function: Callable[..., Any] = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # a module of the user's runs as it is imported
        raise ConfigError(
            [Problem("data.function", f"{config.function} cannot be imported: {root(error)}")]
        ) from error
    if not callable(function):
        raise ConfigError(
            [Problem("data.function", f"{config.function} is no function but {function!r}")]
        )
    try:
        form = signature(function)
    except ValueError:
        return function  # of one written in C nothing is known
    try:
        form.bind(**config.arguments)
    except TypeError as error:
        raise ConfigError(
            [
                Problem(
                    "data.arguments",
                    f"{config.function}{form} does not take them: {error}",
                )
            ]
        ) from error
    return function
