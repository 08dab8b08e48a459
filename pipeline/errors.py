"""Errors that a user can act on: a configuration that cannot run, a stage that failed, storage."""

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_FROM_STORAGE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR")
}
# torch and safetensors say with errors of their own that a file could not be written.
_FROM_WRITERS = ("PytorchStreamWriter", "unexpected pos", "I/O error")


_LONGEST = 300  # characters of a key or a value that are written out


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what a user gave. It is written out by `str`, and nowhere else.

    Attributes:
        key: of the configuration (`train.lr`), or the file or option.
        why: what is wrong, in words; may be empty where `got` says it.
        got: what was given; `...` where that says nothing.
        allowed: what may stand there.
        hint: what to do.
        where: which configuration it is, where there are several: a run of a campaign, a file.
    """

    key: str
    why: str = ""
    got: Any = ...
    allowed: Sequence[Any] = ()
    hint: str = ""
    where: str = ""

    def __str__(self) -> str:
        """One line, whatever the key and the value hold."""
        got = [] if self.got is ... else [f"got {_short(repr(self.got))}"]
        said = ", ".join([*filter(None, [self.why]), *got])
        allowed = f"allowed are {', '.join(map(str, self.allowed))}" if self.allowed else ""
        body = "; ".join(filter(None, [said, allowed, self.hint]))
        return _printable(": ".join(filter(None, [self.where, _short(self.key), body])))

    def within(self, where: str) -> "Problem":
        """Return the problem with the configuration named that it is of."""
        return replace(self, where=": ".join(filter(None, [where, self.where])))

    def as_data(self) -> dict[str, Any]:
        """Return it for other programs: the attributes that are given."""
        words = {n: v for n, v in vars(self).items() if n != "got" and v}
        return words if self.got is ... else {**words, "got": self.got}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _printable(text: str) -> str:
    """Return text with line breaks and other control characters written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class SettingError(ValueError):
    """A setting that does not go with another one of its section; its key is relative to that.

    Attributes:
        problem: what is wrong.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


class ConfigError(ValueError):
    """A configuration that cannot run.

    Attributes:
        problems: what is wrong with it.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__(self.problems)  # exceptions cross process borders by their arguments

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class DamagedFileError(ValueError):
    """A file that is not what was written, or cannot be read; the text names it and says why."""


class StageError(RuntimeError):
    """A stage that failed for a reason its user can act on."""


class RunStoppedError(RuntimeError):
    """Work that ended early because it was asked to; what it says is what was kept."""


# What follows from the settings or the code, not from a machine or a network.
OF_THE_CODE = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError)


def error_text(error: BaseException) -> str:
    """Return an error's kind and text in one line, shortened."""
    return _short(": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())])))


def may_pass(error: Exception) -> bool:
    """Return whether what a storage library raised may be gone at the next try.

    Their errors have no base in common: it is known by what they are not.
    """
    return not (
        isinstance(error, (StageError, RunStoppedError, *OF_THE_CODE)) or is_storage_failure(error)
    )


def is_storage_failure(error: BaseException) -> bool:
    """Return whether storage was full or not writable, which a retry does not fix."""
    if isinstance(error, StageError):
        return False  # reported already
    if isinstance(error, OSError):
        return error.errno in _FROM_STORAGE
    return any(mark in str(error) for mark in _FROM_WRITERS)
