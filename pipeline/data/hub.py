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
from pipeline.storage.hub import ACCESS, hub_commit, is_commit, refusal
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
    revision = pinned_hub(config).revision
    splits = DatasetDict() if not streaming else datasets.IterableDatasetDict()
    for split, (key, name_there) in wanted.items():
        if name_there is None:
            continue
        try:
            loaded = datasets.load_dataset(
                config.path,
                config.name,
                split=name_there,
                revision=revision,
                streaming=streaming,
            )
            splits[split] = with_columns(loaded)
        except Exception as error:  # of many kinds: no hub, no dataset, no split
            refused = refusal("data", config.path, error)
            why = f"{config.path!r} (split {name_there!r}) cannot be loaded: {root(error)}"
            hint = (
                ACCESS if "is a gated dataset" in why else ""
            )  # its cause is cut off by `datasets`
            raise ConfigError([refused or Problem(key, why, hint=hint)]) from error
        if is_commit(revision) and not _is_of(loaded, str(revision)):
            raise ConfigError(
                [
                    Problem(
                        key,
                        f"the hub did not give {config.path!r} (split {name_there!r}), and what this "
                        f"machine has is of another commit than {revision}",
                        hint="try again later",
                    )
                ]
            )
    return splits


def identify_hub(config: HubConfig) -> dict[str, Any]:
    """Return what names the rows' content: the settings, and the commit or a local copy's checksum."""
    values: dict[str, Any] = config.given()
    if Path(config.path).exists():
        values["path"] = content_sha256(Path(config.path))
    else:
        values["revision"] = pinned_hub(config).revision
    return values


def confirm_hub(config: HubConfig, splits: DatasetDict, identity: Mapping[str, Any]) -> None:
    """Check that a local copy is the one that the run's keys were made of; a hub's commit is not asked.

    Raises:
        ConfigError: if it changed since.
    """
    if Path(config.path).exists():
        refuse_changed(identify_hub(config), identity)


def pinned_hub(config: HubConfig) -> HubConfig:
    """Return a dataset with the commit that its revision stands for, where it is on the hub.

    Raises:
        ConfigError: if the hub does not say. In offline mode the revision stays as it is given: the
            cached copy is what there is, and its name identifies it.
    """
    if Path(config.path).exists() or datasets.config.HF_HUB_OFFLINE:
        return config
    commit = hub_commit("dataset", config.path, config.revision, section="data")
    return config.model_copy(update={"revision": commit})


def _is_of(split: Any, commit: str) -> bool:
    """Return whether rows that were read are of a commit, which names their folder in the cache.

    Where the hub fails, `datasets` takes the newest copy on this machine, of whatever commit.
    """
    files = getattr(split, "cache_files", [])  # none where rows are streamed
    return not files or any(commit in Path(file["filename"]).parts for file in files)
