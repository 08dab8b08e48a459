"""What the rows of a table must be, whatever the task: text where text is asked, no column twice."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
from datasets import DatasetDict, Value

from pipeline.errors import ConfigError, Problem

_ROWS_AT_A_TIME = 10_000
_OWN_HEADER = {"names", "column_names", "header", "skiprows"}
_FOR_ROWS = {"features", "usecols", "index_col", "converters", "chunksize", "skipfooter"}


def text_problems(splits: DatasetDict, columns: Mapping[str, str]) -> list[Problem]:
    """Return a problem for each column that holds something else than text, with the first such row.

    Args:
        splits: raw rows.
        columns: key of the configuration -> column; those that are not there are left out.
    """
    problems = []
    for name, split in splits.items():
        for key, column in columns.items():
            if column not in split.column_names:
                continue
            found = _first_that_is_no_text(split, column)
            if found is not None:
                row, value = found
                problems.append(
                    Problem(
                        key,
                        f"row {row + 1} of the {name} data holds no text in column {column!r}",
                        got=value,
                    )
                )
    return problems


def _first_that_is_no_text(split: Any, column: str) -> tuple[int, Any] | None:
    """Return the first row whose value is no text, and the value."""
    start = 0
    if isinstance(feature := split.features[column], Value) and "string" in feature.dtype:
        for table in split.select_columns(column).with_format("arrow").iter(_ROWS_AT_A_TIME):
            if table[column].null_count:
                return start + pc.index(pc.is_null(table[column]), True).as_py(), None
            start += len(table)
        return None
    for row, value in enumerate(split[column]):
        if not isinstance(value, str):
            return row, value
    return None


def check_header(key: str, paths: Iterable[Path], options: Mapping[str, Any]) -> None:
    """Check that no column of a table stands twice in its first line, nor rows have one more.

    Raises:
        ConfigError: naming the file.
        ValueError: if pandas cannot read it.
    """
    if _OWN_HEADER & set(options):
        return
    readable = {name: value for name, value in options.items() if name not in _FOR_ROWS}
    for path in paths:
        head = pd.read_csv(path, header=None, nrows=2, dtype=str, **readable)
        names = head.iloc[0].tolist()
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError([Problem(key, f"{path} has two columns named {twice[0]!r}")])
