"""The data stage: raw rows from files, a hub dataset or a function, tokenized once."""

import csv
import math
from collections.abc import Callable
from importlib import import_module
from inspect import getsourcefile, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
from datasets import DatasetDict
from pydantic import BeforeValidator, Field

from pipeline.artifacts import file_sha256
from pipeline.errors import ConfigError
from pipeline.section import NotNegative, Positive, Section
from pipeline.sources import content_sha256, resolve_path
from pipeline.squad_json import flatten_articles, has_articles
from pipeline.tasks import Task
from pipeline.tasks.base import num_tokens

VERSION = 1

OneOrMore = Annotated[
    list[str],
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=str | list[str],
    ),
]

# Words such as "null" and "NA" are words; only an empty field is a missing value.
_AS_WRITTEN: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}

# suffix -> (builder of `datasets`, its arguments). TSV has no quoting in the form GLUE is given in.
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _AS_WRITTEN),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, **_AS_WRITTEN}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
    ".text": ("text", {}),
}


class _DataConfig(Section):
    rename: dict[str, str] = {}
    """Columns to rename, wherever they occur: old name -> new name."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training rows held out where the source has no validation split."""
    split_seed: NotNegative = 0
    """Seed of that split."""
    max_train_rows: Positive | None = None
    """Use only the first rows of the (shuffled) training split."""
    max_validation_rows: Positive | None = None
    """Use only the first rows of the validation split."""
    num_proc: Positive | None = None
    """Processes that tokenize."""


class FilesConfig(_DataConfig):
    """Local files: CSV, TSV, JSON, JSONL, Parquet or text, by their ending."""

    source: Literal["files"]
    train: OneOrMore
    """Path or paths; `package:NAME/inner/path` reaches into an installed package."""
    validation: OneOrMore | None = None
    """Path or paths; without them a share of the training rows is held out."""
    options: dict[str, Any] = {}
    """Arguments for the reader of `datasets` (column_names, delimiter, quoting, field, ...);
    `field: data` reads SQuAD's own JSON files as questions."""


class HubConfig(_DataConfig):
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


class FunctionConfig(_DataConfig):
    """A function that returns a `datasets.DatasetDict` with a `train` split."""

    source: Literal["function"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, importable on every node."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""


AnyDataConfig = Annotated[FilesConfig | HubConfig | FunctionConfig, Field(discriminator="source")]


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


def load_splits(config: Any, *, streaming: bool = False) -> DatasetDict:
    """Return the raw rows as `train` and `validation`.

    Args:
        config: one of the data configurations.
        streaming: read lazily, for a look at the columns; nothing is split or cut then.

    Raises:
        ConfigError: if a file, a dataset or a split is not there or cannot be read.
    """
    splits = _LOADERS[config.source](config, streaming)
    splits = type(splits)({name: _renamed(name, s, config.rename) for name, s in splits.items()})
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
        splits = DatasetDict(train=parts["train"], validation=parts["test"])
    if config.max_train_rows is not None and config.max_train_rows < len(splits["train"]):
        shuffled = splits["train"].shuffle(seed=config.split_seed)
        splits["train"] = shuffled.select(range(config.max_train_rows))
    if config.max_validation_rows is not None:
        num_rows = min(config.max_validation_rows, len(splits["validation"]))
        splits["validation"] = splits["validation"].select(range(num_rows))
    return splits


def missing_columns(config: Any, task: Task, splits: DatasetDict) -> list[str]:
    """Return a problem for each column the task needs that a split does not have."""
    return [
        f"{key}: column {column!r} is not in the {name} data; there are: {sorted(split.column_names)}"
        for name, split in splits.items()
        for key, column in task.columns().items()
        if column not in split.column_names
    ]


def data_identity(config: Any) -> dict[str, Any]:
    """Return what names the data's content: checksums of files, a hub commit, a function's source."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"num_proc"})
    if config.source == "files":
        for split in ("train", "validation"):
            paths = _paths(config, split)
            values[split] = [[path.suffix.lower(), content_sha256(path)] for path in paths]
    elif config.source == "hub":
        if Path(config.path).exists():
            values["path"] = content_sha256(Path(config.path))
        else:
            values["revision"] = config.revision or _hub_commit(config.path)
    else:
        source = getsourcefile(_function(config))
        values["source_sha256"] = file_sha256(Path(source)) if source else None
    return values


def _renamed(name: str, split: Any, rename: dict[str, str]) -> Any:
    columns = list(split.column_names)
    present = {old: new for old, new in rename.items() if old in columns}
    kept = [column for column in columns if column not in present]
    taken = [
        new for new in present.values() if new in kept or list(present.values()).count(new) > 1
    ]
    if taken:
        raise ConfigError(
            [f"data.rename: {name} data has a column {taken[0]!r} already; there are: {columns}"]
        )
    return split.rename_columns(present) if present else split


def _load_files(config: FilesConfig, streaming: bool) -> DatasetDict:
    splits = DatasetDict() if not streaming else datasets.IterableDatasetDict()
    problems, paths_of = [], {}
    for split in ("train", "validation"):
        try:
            paths_of[split] = _paths(config, split)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    for split, paths in paths_of.items():
        if not paths:
            continue
        suffix = paths[0].suffix.lower()
        builder, arguments = _FORMATS[suffix]
        try:
            rows = _with_columns(
                datasets.load_dataset(
                    builder,
                    data_files=[str(path) for path in paths],
                    split="train",
                    streaming=streaming,
                    **{**arguments, **config.options},
                )
            )
            splits[split] = flatten_articles(rows) if has_articles(rows) else rows
        except Exception as error:  # readers raise what they like; all of it is the file's fault
            raise ConfigError(
                [f"data.{split}: {paths[0]} cannot be read: {_root(error)}"]
            ) from error
    return splits


def _load_hub(config: HubConfig, streaming: bool) -> DatasetDict:
    wanted = {"train": config.train_split, "validation": config.validation_split}
    splits = DatasetDict() if not streaming else datasets.IterableDatasetDict()
    for split, name in wanted.items():
        if name is None:
            continue
        try:
            splits[split] = _with_columns(
                datasets.load_dataset(
                    config.path,
                    config.name,
                    split=name,
                    revision=config.revision,
                    streaming=streaming,
                )
            )
        except Exception as error:  # as above: no hub, no dataset, no split
            raise ConfigError(
                [f"data.path: {config.path!r} (split {name!r}) cannot be loaded: {_root(error)}"]
            ) from error
    return splits


def _load_function(config: FunctionConfig, streaming: bool) -> DatasetDict:
    splits = _function(config)(**config.arguments)  # may be of any kind: it is the user's
    if not isinstance(splits, DatasetDict) or "train" not in splits:
        raise ConfigError(
            [f"data.function: {config.function} must return a DatasetDict with a 'train' split"]
        )
    return splits


_LOADERS: dict[str, Callable[[Any, bool], DatasetDict]] = {
    "files": _load_files,
    "hub": _load_hub,
    "function": _load_function,
}


def _paths(config: FilesConfig, split: str) -> list[Path]:
    paths = []
    for text in getattr(config, split) or []:
        try:
            path = Path(resolve_path(text)).expanduser()
        except ValueError as error:
            raise ConfigError([f"data.{split}: {error}"]) from error
        if not path.is_file():
            raise ConfigError([f"data.{split}: {text} is not a file"])
        if path.suffix.lower() not in _FORMATS:
            raise ConfigError(
                [f"data.{split}: {text} ends in {path.suffix!r}; allowed are {', '.join(_FORMATS)}"]
            )
        paths.append(path)
    suffixes = {path.suffix.lower(): path for path in paths}
    if len(suffixes) > 1:
        names = ", ".join(path.name for path in suffixes.values())
        raise ConfigError([f"data.{split}: files of one split must end alike, got {names}"])
    return paths


def _function(config: FunctionConfig) -> Callable[..., Any]:
    module, _, name = config.function.partition(":")
    try:
        function: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            [f"data.function: {config.function} cannot be imported: {error}"]
        ) from error
    if not callable(function):
        raise ConfigError([f"data.function: {config.function} is no function but {function!r}"])
    try:
        signature(function).bind(**config.arguments)
    except TypeError as error:
        raise ConfigError(
            [f"data.arguments: {config.function}{signature(function)} does not take them: {error}"]
        ) from error
    return function


def _hub_commit(path: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(path).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None  # offline: the cached copy is what there is, and its name identifies it


def _with_columns(split: Any) -> Any:
    """A streamed split may not know its columns before its first row."""
    return split if split.column_names is not None else split._resolve_features()


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
