"""What a job has of the working folder: Ray ships a copy, without what .gitignore and others name."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import Problem
from pipeline.runs.named_files import NamedFile


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

    def problem(self, file: NamedFile) -> Problem | None:
        """Return why a job would not have a file or folder; None if it would."""
        given = Path(file.path).expanduser()
        path = Path(os.path.normpath(self.root / given))
        inside = path.is_relative_to(self.root)
        if given.is_absolute():
            if any(path.is_relative_to(folder) for folder in self.shared):
                return None
            hint = "name a folder that all nodes have by --shared FOLDER"
            if inside:
                hint = f"write {path.relative_to(self.root)}, or {hint}"
            return self._missing(file, f"is not in the copy of {self.root} that a job has", hint)
        if not inside:
            return self._missing(file, f"is not in {self.root}, the folder that is shipped")
        if not path.exists():
            if file.module or (file.on_hub and not file.path.startswith("./")):
                return None
            return self._missing(file, f"is not there in {self.root}, the folder that is shipped")
        needed = [path, *(f for pattern in file.needed for f in sorted(path.glob(pattern)))]
        left_out = next((found for found in needed if self.leaves_out(found)), None)
        if left_out is None:
            return None
        return self._missing(
            file,
            f"{left_out.relative_to(self.root)} is not shipped: .gitignore, .rayignore or --exclude names it",
        )

    @staticmethod
    def _missing(file: NamedFile, why: str, hint: str = "") -> Problem:
        return Problem(file.key, why, got=file.path, hint=hint)
