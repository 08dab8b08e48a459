"""Rows of local files."""

import csv
from collections.abc import Mapping
from logging import CRITICAL
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.compute as pc
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
from pipeline.data.checks import check_header, check_json, check_parquet
from pipeline.data.squad_json import flatten_articles, has_articles
from pipeline.errors import ConfigError, Problem
from pipeline.section import OneOrMore
from pipeline.store.locations import content_sha256, is_file, resolve_path

# Words such as "null" and "NA" are words; of columns that are no text an empty field is a missing value.
_AS_WRITTEN: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}

# suffix -> (builder of `datasets`, its arguments). TSV has no quoting in the form GLUE is given in.
# What `datasets` and pyarrow say of a file without rows.
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")
_WHOLE_NUMBER = r"^(0|-?[1-9][0-9]{0,17})$"  # that int64 holds, as Python writes it
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _AS_WRITTEN),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, **_AS_WRITTEN}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
    ".text": ("text", {}),
}


class FilesConfig(DataConfig):
    """Local files: CSV, TSV, JSON, JSONL, Parquet or text, by their ending."""

    source: Literal["files"]
    train: OneOrMore
    """Path or paths; `package:NAME/inner/path` reaches into an installed package."""
    validation: OneOrMore | None = None
    """Path or paths; without them a share of the training rows is held out."""
    extra_validation: dict[SetName, OneOrMore] = {}
    """Further sets to score on: name -> path or paths. Their metrics are called `name/metric`."""
    options: dict[str, Any] = {}
    """Arguments for the reader of `datasets` (column_names, delimiter, quoting, field, ...);
    `field: data` reads SQuAD's own JSON files as questions."""


def load_files(
    config: FilesConfig, streaming: bool, as_written: AsWritten = NOTHING_AS_WRITTEN
) -> DatasetDict:
    """Return the rows of each split.

    Args:
        config: which files.
        streaming: read lazily.
        as_written: columns by what they are called in the files.

    Raises:
        ConfigError: if a file is not there or cannot be read.
    """
    splits = DatasetDict() if not streaming else datasets.IterableDatasetDict()
    problems: list[Problem] = []
    found = {}
    for split, (key, given) in _wanted_files(config).items():
        try:
            found[split] = (key, _paths(key, given))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    for split, (key, paths) in found.items():
        suffix = paths[0].suffix.lower()
        builder, arguments = _FORMATS[suffix]
        options = {**arguments, **config.options}
        try:
            if builder == "csv":
                check_header(key, paths, options)
                rows = _read_table(paths, streaming, options, as_written)
            elif builder == "json":
                check_json(key, paths, options)
                rows = _read("json", paths, streaming, options)
                rows = _dates_as_written(rows, as_written, paths, streaming, options)
            else:
                if builder == "parquet":
                    check_parquet(key, paths)
                rows = _read(builder, paths, streaming, options)
            splits[split] = flatten_articles(rows) if has_articles(rows) else rows
        except ConfigError:
            raise
        except Exception as error:  # readers raise what they like; all of it is the file's fault
            why = f"cannot be read: {root(error)}"
            if any(words in why for words in _NO_ROWS):
                why = "holds no rows"
            raise ConfigError([Problem(key, f"{paths[0]} {why}")]) from error
        if next(iter(rows), None) is None:
            raise ConfigError([Problem(key, f"{paths[0]} holds no rows")])
    return splits


def _read(builder: str, paths: list[Path], streaming: bool, options: dict[str, Any]) -> Any:
    files = [str(path) for path in paths]
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(CRITICAL)  # it logs the errors that it raises, too
    try:
        return with_columns(
            datasets.load_dataset(
                builder, data_files=files, split="train", streaming=streaming, **options
            )
        )
    finally:
        datasets.logging.set_verbosity(verbosity)


def _read_table(
    paths: list[Path], streaming: bool, options: dict[str, Any], as_written: AsWritten
) -> Any:
    """Return the rows of CSV, the columns that stay as they are written read as text."""
    if "features" in options:
        return _read("csv", paths, streaming, options)
    labels = set() if streaming else set(as_written.labels)
    # In one order, for `datasets` knows by it what it has read before.
    converters = {
        column: _as_it_is if column in as_written.text else _filled
        for column in sorted({*labels, *as_written.text})
    }
    rows = _read("csv", paths, streaming, {"converters": converters, **options})
    for column in labels & set(rows.column_names):
        values = rows.data.column(column)
        if "string" not in getattr(rows.features[column], "dtype", ""):
            continue
        if pc.all(pc.match_substring_regex(values, _WHOLE_NUMBER)).as_py():
            rows = rows.cast_column(column, datasets.Value("int64"))
    return rows


def _as_it_is(field: str) -> str:
    """Return a field as it is written; an empty one is the empty text, as in JSON."""
    return field


def _filled(field: str) -> str | None:
    """Return a label as it is written; an empty one is missing, whatever pandas makes of it."""
    return field or None


def _dates_as_written(
    rows: Any, as_written: AsWritten, paths: list[Path], streaming: bool, options: dict[str, Any]
) -> Any:
    """Return the rows of JSON, read again where text that looks like dates was taken for dates."""
    features = dict(rows.features)
    dates = {
        name
        for name in {*as_written.text, *as_written.labels} & set(features)
        if isinstance(features[name], datasets.Value)
        and features[name].dtype.startswith(("timestamp", "date", "time"))
    }
    if not dates or "features" in options:
        return rows
    kinds = {n: datasets.Json() if n in dates else kind for n, kind in features.items()}
    return _read("json", paths, streaming, {**options, "features": datasets.Features(kinds)})


def identify_files(config: FilesConfig) -> dict[str, Any]:
    """Return what names the rows' content: the settings, and a checksum of every file."""
    values: dict[str, Any] = config.given()
    files = {name: _checksums(*given) for name, given in _wanted_files(config).items()}
    values |= {split: files.pop(split) for split in ("train", "validation") if split in files}
    if files:
        values["extra_validation"] = files
    return values


def confirm_files(config: FilesConfig, splits: DatasetDict, identity: Mapping[str, Any]) -> None:
    """Check that the files are those that the run's keys were made of.

    Raises:
        ConfigError: if they changed since.
    """
    refuse_changed(identify_files(config), identity)


def _wanted_files(config: FilesConfig) -> dict[str, tuple[str, list[str]]]:
    """Return what is to be read: split -> (key of the configuration, paths as given)."""
    wanted = {
        "train": ("data.train", config.train),
        "validation": ("data.validation", config.validation or []),
    }
    for name, paths in config.extra_validation.items():
        wanted[name] = (f"data.extra_validation.{name}", paths)
    return {split: (key, paths) for split, (key, paths) in wanted.items() if paths}


def _paths(key: str, given: list[str]) -> list[Path]:
    paths = []
    for text in given:
        try:
            path = Path(resolve_path(text)).expanduser()
        except ValueError as error:
            raise ConfigError([Problem(key, str(error))]) from error
        if not is_file(path):
            raise ConfigError([Problem(key, f"{text} is not a file")])
        if path.suffix.lower() not in _FORMATS:
            raise ConfigError(
                [Problem(key, f"{text} ends in {path.suffix!r}", allowed=tuple(_FORMATS))]
            )
        paths.append(path)
    suffixes = {path.suffix.lower(): path for path in paths}
    if len(suffixes) > 1:
        names = ", ".join(path.name for path in suffixes.values())
        raise ConfigError([Problem(key, f"files of one split must end alike, got {names}")])
    return paths


def _checksums(key: str, given: list[str]) -> list[list[str]]:
    return [[path.suffix.lower(), content_sha256(path)] for path in _paths(key, given)]
