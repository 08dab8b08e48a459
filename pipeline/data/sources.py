"""Where rows come from: files, a dataset of the hub, or a function; and what names their content."""

import csv
from collections.abc import Callable
from importlib import import_module
from inspect import getsourcefile, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
from datasets import DatasetDict
from pydantic import AfterValidator, Field

from pipeline.data.squad_json import flatten_articles, has_articles
from pipeline.errors import ConfigError
from pipeline.section import NotNegative, OneOrMore, Positive, Section
from pipeline.store.artifacts import file_sha256
from pipeline.store.locations import content_sha256, resolve_path


def _not_taken(name: str) -> str:
    if name in ("train", "validation"):
        raise ValueError(f"{name!r} is the name of a split there is already; choose another")
    return name


SetName = Annotated[str, Field(pattern=r"^\w[\w.-]*$"), AfterValidator(_not_taken)]
"""Name of a further validation set: of its metrics (`mismatched/accuracy`) and of a folder."""

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


class DataConfig(Section):
    """What all sources share."""

    rename: dict[str, str] = {}
    """Columns to rename, wherever they occur: old name -> new name."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training rows held out where the source has no validation split."""
    split_seed: NotNegative = 0
    """Seed of that split."""
    max_train_rows: Positive | None = None
    """Use only the first rows of the (shuffled) training split."""
    max_validation_rows: Positive | None = None
    """Use only the first rows of the validation split, and of each further one."""
    num_proc: Positive | None = None
    """Processes that tokenize."""


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


class FunctionConfig(DataConfig):
    """A function that returns a `datasets.DatasetDict` with a `train` split."""

    source: Literal["function"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, importable on every node."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""
    extra_validation: dict[SetName, str] = {}
    """Further splits to score on: name -> split returned. Their metrics are called `name/metric`."""


AnySourceConfig = Annotated[FilesConfig | HubConfig | FunctionConfig, Field(discriminator="source")]


def load_source(config: Any, *, streaming: bool = False) -> DatasetDict:
    """Return a source's raw rows, columns renamed: `train`, what there is of `validation`, further sets.

    Args:
        config: of files, the hub or a function.
        streaming: read lazily, for a look at the columns.

    Raises:
        ConfigError: if a file, a dataset or a split is not there or cannot be read.
    """
    splits = _LOADERS[config.source](config, streaming)
    return renamed(splits, config.rename)


def renamed(splits: DatasetDict, rename: dict[str, str]) -> DatasetDict:
    """Return the splits with columns renamed, wherever they occur.

    Raises:
        ConfigError: if a split has a column of the new name already.
    """
    return type(splits)({name: _renamed(name, split, rename) for name, split in splits.items()})


def source_identity(config: Any) -> dict[str, Any]:
    """Return what names the rows' content: checksums of files, a hub commit, a function's source."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"num_proc"})
    if config.source == "files":
        files = {name: _checksums(config, *given) for name, given in _wanted_files(config).items()}
        values |= {split: files.pop(split, []) for split in ("train", "validation")}
        values["extra_validation"] = files
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


# Files.


def _wanted_files(config: FilesConfig) -> dict[str, tuple[str, list[str]]]:
    """Return what is to be read: split -> (key of the configuration, paths as given)."""
    wanted = {
        "train": ("data.train", config.train),
        "validation": ("data.validation", config.validation or []),
    }
    for name, paths in config.extra_validation.items():
        wanted[name] = (f"data.extra_validation.{name}", paths)
    return {split: (key, paths) for split, (key, paths) in wanted.items() if paths}


def _load_files(config: FilesConfig, streaming: bool) -> DatasetDict:
    splits = DatasetDict() if not streaming else datasets.IterableDatasetDict()
    problems, found = [], {}
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
            raise ConfigError([f"{key}: {paths[0]} cannot be read: {root(error)}"]) from error
    return splits


def _paths(key: str, given: list[str]) -> list[Path]:
    paths = []
    for text in given:
        try:
            path = Path(resolve_path(text)).expanduser()
        except ValueError as error:
            raise ConfigError([f"{key}: {error}"]) from error
        if not path.is_file():
            raise ConfigError([f"{key}: {text} is not a file"])
        if path.suffix.lower() not in _FORMATS:
            raise ConfigError(
                [f"{key}: {text} ends in {path.suffix!r}; allowed are {', '.join(_FORMATS)}"]
            )
        paths.append(path)
    suffixes = {path.suffix.lower(): path for path in paths}
    if len(suffixes) > 1:
        names = ", ".join(path.name for path in suffixes.values())
        raise ConfigError([f"{key}: files of one split must end alike, got {names}"])
    return paths


def _checksums(config: FilesConfig, key: str, given: list[str]) -> list[list[str]]:
    return [[path.suffix.lower(), content_sha256(path)] for path in _paths(key, given)]


# The hub.


def _load_hub(config: HubConfig, streaming: bool) -> DatasetDict:
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
            splits[split] = _with_columns(
                datasets.load_dataset(
                    config.path,
                    config.name,
                    split=name_there,
                    revision=config.revision,
                    streaming=streaming,
                )
            )
        except Exception as error:  # as above: no hub, no dataset, no split
            raise ConfigError(
                [f"{key}: {config.path!r} (split {name_there!r}) cannot be loaded: {root(error)}"]
            ) from error
    return splits


def _hub_commit(path: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(path).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None  # offline: the cached copy is what there is, and its name identifies it


# Functions.


def _load_function(config: FunctionConfig, streaming: bool) -> DatasetDict:
    returned = _function(config)(**config.arguments)  # may be of any kind: it is the user's
    if not isinstance(returned, DatasetDict) or "train" not in returned:
        raise ConfigError(
            [f"data.function: {config.function} must return a DatasetDict with a 'train' split"]
        )
    splits = DatasetDict({k: returned[k] for k in ("train", "validation") if k in returned})
    for name, split in config.extra_validation.items():
        if split not in returned:
            raise ConfigError(
                [
                    f"data.extra_validation.{name}: {config.function} returns no split {split!r}; "
                    f"there are: {sorted(returned)}"
                ]
            )
        splits[name] = returned[split]
    return splits


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


_LOADERS: dict[str, Callable[[Any, bool], DatasetDict]] = {
    "files": _load_files,
    "hub": _load_hub,
    "function": _load_function,
}


def _with_columns(split: Any) -> Any:
    """A streamed split may not know its columns before its first row."""
    return split if split.column_names is not None else split._resolve_features()


def root(error: BaseException) -> str:
    """Return what lies at the bottom of a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
