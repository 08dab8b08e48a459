"""What a user did that cannot run: one error with every problem found."""

from collections.abc import Iterable


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
