"""Rows of a function of the user's."""

from collections.abc import Callable
from importlib import import_module
from inspect import getsourcefile, signature
from pathlib import Path
from typing import Annotated, Any, Literal

from datasets import DatasetDict
from pydantic import Field

from pipeline.data.base import DataConfig, SetName
from pipeline.errors import ConfigError, Problem
from pipeline.store.artifacts import file_sha256


class FunctionConfig(DataConfig):
    """A function that returns a `datasets.DatasetDict` with a `train` split."""

    source: Literal["function"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, importable on every node."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""
    extra_validation: dict[SetName, str] = {}
    """Further splits to score on: name -> split returned. Their metrics are called `name/metric`."""


def load_function(config: FunctionConfig, streaming: bool) -> DatasetDict:
    """Return the rows that the function returns, by split; it has no other way than to make all.

    Raises:
        ConfigError: if it cannot be imported or called so, or returns something else.
    """
    returned = _function(config)(**config.arguments)  # may be of any kind: it is the user's
    if not isinstance(returned, DatasetDict) or "train" not in returned:
        raise ConfigError(
            [
                Problem(
                    "data.function",
                    f"{config.function} must return a DatasetDict with a 'train' split",
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
    return splits


def identify_function(config: FunctionConfig) -> dict[str, Any]:
    """Return what names the rows' content: the settings, and a checksum of the function's file."""
    values: dict[str, Any] = config.given()
    source = getsourcefile(_function(config))
    values["source_sha256"] = file_sha256(Path(source)) if source else None
    return values


def _function(config: FunctionConfig) -> Callable[..., Any]:
    module, _, name = config.function.partition(":")
    try:
        function: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            [Problem("data.function", f"{config.function} cannot be imported: {error}")]
        ) from error
    if not callable(function):
        raise ConfigError(
            [Problem("data.function", f"{config.function} is no function but {function!r}")]
        )
    try:
        signature(function).bind(**config.arguments)
    except TypeError as error:
        raise ConfigError(
            [
                Problem(
                    "data.arguments",
                    f"{config.function}{signature(function)} does not take them: {error}",
                )
            ]
        ) from error
    return function
