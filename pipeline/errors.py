"""Errors that a user can act on: a configuration that cannot run, a stage that failed, storage."""

import errno
from collections.abc import Iterable

_FROM_STORAGE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR")
}
# torch and safetensors say with errors of their own that a file could not be written.
_FROM_WRITERS = ("PytorchStreamWriter", "unexpected pos", "I/O error")


class ConfigError(ValueError):
    """A configuration that cannot run.

    Attributes:
        problems: one line each: the key or file, what was got, what is allowed.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        # Exceptions cross process borders by their arguments.
        return ConfigError, (self.problems,)


class StageError(RuntimeError):
    """A stage that failed for a reason its user can act on."""


def is_storage_failure(error: BaseException) -> bool:
    """Return whether storage was full or not writable, which a retry does not fix."""
    if isinstance(error, StageError):
        return False  # reported already
    if isinstance(error, OSError):
        return error.errno in _FROM_STORAGE
    return any(mark in str(error) for mark in _FROM_WRITERS)
