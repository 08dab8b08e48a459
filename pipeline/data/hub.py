"""Rows of a dataset of the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import DatasetDict

from pipeline.data.base import (
    NOTHING_AS_WRITTEN,
    AsWritten,
    DataConfig,
    SetName,
    refuse_changed,
    root,
    with_columns,
)
from pipeline.errors import ConfigError, Problem
from pipeline.store.locations import content_sha256


class HubConfig(DataConfig):
    """A dataset of the Hugging Face hub, or a local copy of one."""

    source: Literal["hub"]
    path: str
    """Name on the hub ("nyu-mll/glue") or folder."""
    name: str | None = None
    """Configuration of the dataset ("sst2")."""
    revision: str | None = None
    """Branch, tag or commit."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = "validation"
    """Split to evaluate on; null holds out a share of the training rows."""
    extra_validation: dict[SetName, str] = {}
    """Further splits to score on: name -> split. Their metrics are called `name/metric`."""


def load_hub(
    config: HubConfig, streaming: bool, as_written: AsWritten = NOTHING_AS_WRITTEN
) -> DatasetDict:
    """Return the rows of each split; their types are the dataset's, whatever is asked.

    Raises:
        ConfigError: if the hub, the dataset or a split cannot be reached.
    """
    wanted = {
        "train": ("data.path", config.train_split),
        "validation": ("data.path", config.validation_split),
    }
    for name, split in config.extra_validation.items():
        wanted[name] = (f"data.extra_validation.{name}", split)
    splits = DatasetDict() if not streaming else datasets.IterableDatasetDict()
    for split, (key, name_there) in wanted.items():
        if name_there is None:
            continue
        try:
            splits[split] = with_columns(
                datasets.load_dataset(
                    config.path,
                    config.name,
                    split=name_there,
                    revision=config.revision,
                    streaming=streaming,
                )
            )
        except Exception as error:  # of many kinds: no hub, no dataset, no split
            raise ConfigError(
                [
                    Problem(
                        key,
                        f"{config.path!r} (split {name_there!r}) cannot be loaded: {root(error)}",
                    )
                ]
            ) from error
    return splits


def identify_hub(config: HubConfig) -> dict[str, Any]:
    """Return what names the rows' content: the settings, and the commit or a local copy's checksum."""
    values: dict[str, Any] = config.given()
    if Path(config.path).exists():
        values["path"] = content_sha256(Path(config.path))
    else:
        values["revision"] = config.revision or _hub_commit(config.path)
    return values


def confirm_hub(config: HubConfig, splits: DatasetDict, identity: Mapping[str, Any]) -> None:
    """Check that a local copy is the one that the run's keys were made of; a hub's commit is not asked.

    Raises:
        ConfigError: if it changed since.
    """
    if Path(config.path).exists():
        refuse_changed(identify_hub(config), identity)


def _hub_commit(path: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(path).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None  # offline: the cached copy is what there is, and its name identifies it
