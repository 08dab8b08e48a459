"""What the repository's own files say: tracked files, and the strings of a Python file."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.processes import ROOT


@cache
def tracked() -> frozenset[str]:
    """Return the paths of all files of the repository, those not yet committed too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return frozenset(line for line in listed.stdout.splitlines() if (ROOT / line).exists())


def strings_of(path: Path) -> Iterator[str]:
    """Yield the strings of a Python file, docstrings too, parts of f-strings by themselves."""
    for _, text in placed_strings_of(path):
        yield text


def placed_strings_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each string with the line it begins in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split(" "))
