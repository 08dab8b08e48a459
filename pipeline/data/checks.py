"""What the rows of a table must be, whatever the task: text where text is asked, no column twice."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import DatasetDict, Value

from pipeline.errors import ConfigError, Problem

_ROWS_AT_A_TIME = 10_000
_HEAD = 1 << 20  # characters of a JSON file that are looked at
_OWN_HEADER = {"names", "column_names", "header", "skiprows"}
_FOR_ROWS = {"features", "usecols", "index_col", "converters", "chunksize", "nrows", "skipfooter"}


def text_problems(
    splits: DatasetDict, columns: Mapping[str, str], optional: Collection[str] = ()
) -> list[Problem]:
    """Return a problem for each column that holds something else than text, with the first such row.

    Args:
        splits: raw rows.
        columns: key of the configuration -> column.
        optional: columns that a row may have nothing in.
    """
    problems = []
    for name, split in splits.items():
        for key, column in columns.items():
            found = _first_that_is_no_text(split, column, optional=column in optional)
            if found is not None:
                row, value = found
                problems.append(
                    Problem(
                        key,
                        f"row {row + 1} of the {name} data holds no text in column {column!r}",
                        got=value,
                        hint="leave out the rows without one" if value is None else "",
                    )
                )
    return problems


def _first_that_is_no_text(split: Any, column: str, *, optional: bool) -> tuple[int, Any] | None:
    """Return the first row whose value is no text, and the value."""
    if isinstance(feature := split.features[column], Value) and "string" in feature.dtype:
        return None if optional else _first_missing(split, column)
    for row, value in enumerate(split[column]):
        if not (isinstance(value, str) or (optional and value is None)):
            return row, value
    return None


def _first_missing(split: Any, column: str) -> tuple[int, None] | None:
    start = 0
    for table in split.select_columns(column).with_format("arrow").iter(_ROWS_AT_A_TIME):
        if table[column].null_count:
            return start + pc.index(pc.is_null(table[column]), True).as_py(), None
        start += len(table)
    return None


def empty_problems(splits: DatasetDict) -> list[Problem]:
    """Return a problem for each split without a row."""
    return [
        Problem("data", f"the {name} data has no rows")
        for name, split in splits.items()
        if not len(split)
    ]


def check_json(key: str, paths: Iterable[Path], options: Mapping[str, Any]) -> None:
    """Check that JSON begins with an object, or a list, and the first one has no key twice.

    pyarrow crashes on a file that begins with null, and of two keys some readers take the last one.

    Raises:
        ConfigError: naming the file.
        ValueError: if it is not in the encoding.
    """
    for path in paths:
        with path.open(encoding=options.get("encoding", "utf-8-sig")) as file:
            head = file.read(_HEAD).lstrip()
        if not head.startswith(("{", "[")):
            begins = f"begins with {head[:20]!r}" if head else "is empty"
            raise ConfigError([Problem(key, f"{path} {begins}", hint="JSON rows are objects")])
        twice: list[str] = []

        def look(pairs: list[tuple[str, Any]], twice: list[str] = twice) -> dict[str, Any]:
            names = [name for name, _ in pairs]
            twice += {name for name in names if names.count(name) > 1}
            return dict(pairs)

        try:
            json.JSONDecoder(object_pairs_hook=look).raw_decode(head, max(head.find("{"), 0))
        except (ValueError, RecursionError):
            continue  # the reader says what is wrong with it, or the first object is a long one
        _refuse_twice(key, path, [*twice, *twice])


def check_parquet(key: str, paths: Iterable[Path]) -> None:
    """Check that no column of a Parquet file stands twice in its schema.

    Raises:
        ConfigError: naming the file.
        ValueError: if pyarrow cannot read it.
    """
    for path in paths:
        _refuse_twice(key, path, pq.read_schema(path).names)


def _refuse_twice(key: str, path: Path, names: list[Any]) -> None:
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError([Problem(key, f"{path} has two columns named {twice[0]!r}")])


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
        _refuse_twice(key, path, head.iloc[0].tolist())
