"""What a job has of the working folder: Ray ships a copy, without what .gitignore and others name."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import Problem
from pipeline.runs.named_files import NamedFile

# Ray puts the folder before all others that modules are imported from.
_PACKAGES = ("launch", "pipeline", "mgpp")
_IGNORED = ".gitignore, .rayignore or --exclude"


class Shipment:
    """A folder that is shipped, and what of it is left out.

    Attributes:
        root: the folder.
        excludes: patterns of what is left out, as in .gitignore.
        shared: folders that all nodes have, under the same path.
    """

    def __init__(self, root: Path, excludes: Sequence[str], shared: Iterable[str] = ()) -> None:
        self.root = root
        self.excludes = excludes
        self.shared = [Path(folder).absolute() for folder in shared]

    def leaves_out(self, path: Path) -> bool:
        """Return whether Ray leaves out a path of the folder; decided by Ray's own code.

        Git's answer would be another one: it goes by what is tracked and by ignore files above the
        folder, which Ray does not.
        """
        from ray._private.ray_constants import (
            RAY_RUNTIME_ENV_IGNORE_GITIGNORE,
            get_runtime_env_default_excludes,
        )
        from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files

        by_git = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
        logger = logging.getLogger(__name__)
        patterns = [*get_runtime_env_default_excludes(), *self.excludes]
        rules = [_get_excludes(self.root, patterns)]
        for place in reversed([path, *path.relative_to(self.root).parents]):
            here = self.root / place
            rules += get_excludes_from_ignore_files(here, by_git, logger)
            if any(rule(here) for rule in rules):
                return True
        return False

    def name_problems(self) -> list[Problem]:
        """Return which modules jobs would import instead of mgpp's own; none in a checkout of mgpp."""
        if all((self.root / name / "py.typed").is_file() for name in _PACKAGES):
            return []
        why = "jobs would import it instead of mgpp's own"
        return [
            Problem(place, why, hint="rename it, or leave it out by --exclude")
            for name in _PACKAGES
            for place in (f"{name}.py", f"{name}/__init__.py")
            if (self.root / place).is_file() and not self.leaves_out(self.root / place)
        ]

    def problem(self, file: NamedFile) -> Problem | None:
        """Return why a job would not have a file or folder; None if it would."""
        given = Path(file.path).expanduser()
        path = Path(os.path.normpath(self.root / given))
        if given.is_absolute():
            return self._of_elsewhere(file, path)
        why = ""
        if not path.is_relative_to(self.root):
            why = f"is not in {self.root}, the folder that is shipped"
        elif os.path.exists(path):  # noqa: PTH110  # a name too long for a file is no error of it
            needed = [path, *(f for pattern in file.needed for f in sorted(path.glob(pattern)))]
            left_out = next((found for found in needed if self.leaves_out(found)), None)
            if left_out is not None:
                why = f"{left_out.relative_to(self.root)} is not shipped: {_IGNORED} names it"
        elif not file.module and (not file.on_hub or file.path.startswith("./")):
            why = f"is not there in {self.root}, the folder that is shipped"
        return Problem(file.key, why, got=file.path) if why else None

    def _of_elsewhere(self, file: NamedFile, path: Path) -> Problem | None:
        """Return why a job would not have what lies at an absolute path."""
        if any(path.is_relative_to(folder) for folder in self.shared):
            return None
        hint = "name a folder that all nodes have by --shared FOLDER"
        if path.is_relative_to(self.root):
            hint = f"write {path.relative_to(self.root)}, or {hint}"
        why = f"is not in the copy of {self.root} that a job has"
        return Problem(file.key, why, got=file.path, hint=hint)
