"""What all sources of rows share."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from pipeline.errors import ConfigError, Problem
from pipeline.section import Positive, Section, Seed

_LONGEST = 300  # characters of an error


def _not_taken(name: str) -> str:
    if name in ("train", "validation"):
        raise ValueError(f"{name!r} is the name of a split there is already; choose another")
    return name


SetName = Annotated[str, Field(pattern=r"^\w[\w.-]*$"), AfterValidator(_not_taken)]
"""Name of a further validation set: of its metrics (`mismatched/accuracy`) and of a folder."""


class DataConfig(Section):
    """What all sources share."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"num_proc"})

    rename: dict[str, str] = {}
    """Columns to rename, wherever they occur: old name -> new name."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training rows held out where the source has no validation split."""
    split_seed: Seed = 0
    """Seed of that split."""
    max_train_rows: Positive | None = None
    """Use only the first rows of the (shuffled) training split."""
    max_validation_rows: Positive | None = None
    """Use only the first rows of the validation split, and of each further one."""
    num_proc: Positive | Literal["auto"] = "auto"
    """Processes that tokenize, a core each; `auto`: as many as there are free cores, on one node. The
    rows are the same for any number."""


@dataclass(frozen=True, kw_only=True)
class AsWritten:
    """Columns of which a file without types says nothing: their values stay as they are written.

    Attributes:
        text: of text; `007` is no number in them.
        labels: of classes, text too unless all are whole numbers as Python writes them.
    """

    text: Collection[str] = ()
    labels: Collection[str] = ()

    def before(self, rename: Mapping[str, str]) -> "AsWritten":
        """Return the columns by what they may be called before they are renamed."""

        def names(columns: Collection[str]) -> list[str]:
            old = [name for name, new in rename.items() if new in columns]
            return [*old, *(column for column in columns if column not in rename)]

        return AsWritten(text=names(self.text), labels=names(self.labels))


NOTHING_AS_WRITTEN = AsWritten()


def refuse_changed(now: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse files that are not those that the run's keys were made of.

    Args:
        now: what names their content.
        identity: what named it then.

    Raises:
        ConfigError: if the two differ.
    """
    if any(identity.get(name) != value for name, value in now.items()):
        raise ConfigError(
            [Problem("data", "its files changed after the run's keys were made", hint="run again")]
        )


def with_columns(split: Any) -> Any:
    """Return a split that knows its columns; a streamed one may have to read its first row."""
    return split if split.column_names is not None else split._resolve_features()


def root(error: BaseException) -> str:
    """Return what lies at the bottom of a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return ": ".join(filter(None, [type(error).__name__, text]))
