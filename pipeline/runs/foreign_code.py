"""Code from outside of mgpp that a configuration names: found by name and by parsing, without running it.

Whoever gives a command says by `--allow-code` that it may run. A configuration cannot say so itself.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import Problem

OPTION = "--allow-code"
# Functions of mgpp that return rows. Any other one, from here too, may do anything with its arguments.
OWN_FUNCTIONS = frozenset({"pipeline.data.lexicon:load_words"})
_MOST_BYTES = 4 << 20  # of a module that is parsed
_HINT = f"read it, and give {OPTION} if it may run"


def foreign_code(sections: Mapping[str, Any]) -> list[Problem]:
    """Return what of a configuration is code from outside of mgpp, as what is wrong without permission.

    Args:
        sections: those of a run that are right, by name.
    """
    found = []
    model = sections.get("model")
    if model is not None and model.trust_remote_code:
        why = "code that comes with the model is not run unless allowed"
        found.append(Problem("model.trust_remote_code", why, got=True, hint=_HINT))
    for key, function in _functions("data", sections.get("data")):
        why = "a function from outside of mgpp is not run unless allowed"
        found.append(Problem(key, why, got=function, hint=_HINT))
    return found


def name_problems(sections: Mapping[str, Any]) -> list[Problem]:
    """Return which functions from outside are not where their names say: files are parsed, not run."""
    return [
        Problem(key, fault, got=function)
        for key, function in _functions("data", sections.get("data"))
        if (fault := _name_fault(function))
    ]


def _functions(key: str, data: Any) -> Iterator[tuple[str, str]]:
    """Yield the functions from outside of mgpp that give rows, with their keys."""
    for i, part in enumerate(getattr(data, "parts", [])):
        yield from _functions(f"{key}.parts.{i}", part)
    if data is not None and data.source == "function" and data.function not in OWN_FUNCTIONS:
        yield f"{key}.function", data.function


def _name_fault(function: str) -> str:
    """Return why a function is not where its name says; nothing where only running it would tell."""
    module, _, name = function.partition(":")
    file = _file_of(module)
    if file is None:
        return f"there is no module {module!r}"
    if file.suffix != ".py":
        return ""  # compiled, or built in
    try:
        if file.stat().st_size > _MOST_BYTES:
            return f"{file} is too large for a module"
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        return f"{file} is no Python: line {error.lineno}"
    except (OSError, ValueError, RecursionError, MemoryError):
        return f"{file} cannot be read as Python"
    names = set(_bound(tree.body))
    return "" if {name, "*", "__getattr__"} & names else f"{file} has no {name!r}"


def _file_of(module: str) -> Path | None:
    """Return a module's file: what importing it would run, with no package above it imported.

    One that is part of the interpreter is what the interpreter was started from.
    """
    top, *inner = module.split(".")
    if not all(part.isidentifier() for part in (top, *inner)):
        return None
    if top in sys.builtin_module_names:
        return None if inner else Path(sys.executable)
    try:
        spec = find_spec(top) or PathFinder.find_spec(top, [str(Path.cwd())])
    except (ImportError, ValueError, AttributeError):
        return None
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    if spec is None or spec.origin is None:
        return None
    return Path(sys.executable) if spec.origin in ("built-in", "frozen") else Path(spec.origin)


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements bind, those within `if`, `try`, `with` and loops too."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
            continue
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name.partition(".")[0]
        # Of a statement with others in it, what stands before them: `for x in`, `with open() as x`.
        heads = [getattr(statement, name, None) for name in ("target", "items", "test", "subject")]
        for head in heads if _blocks(statement) else [statement]:
            for part in head if isinstance(head, list) else filter(None, [head]):
                yield from _stored(part)
        for block in _blocks(statement):
            yield from _bound(block)


def _stored(part: ast.AST) -> Iterator[str]:
    for node in ast.walk(part):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """Return the statements within one."""
    handlers = [handler.body for handler in getattr(statement, "handlers", [])]
    cases = [case.body for case in getattr(statement, "cases", [])]
    own = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    return [block for block in (*own, *handlers, *cases) if block]
