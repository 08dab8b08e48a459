"""YAML files that mean what they look like, and of which an error prints no line.

What YAML 1.1 reads as something else is refused, and so is what a reference would bring in from outside
or blow up. A file that a configuration names may be anyone's: what is wrong is said by line and column.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse as parse_references

from pipeline.errors import Problem, SettingError

DEEPEST = 32
LARGEST_BYTES = 1 << 20
_BASE_60 = re.compile(r"[-+]?[0-9_]+(:[0-9_]+)+(\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp", "value")
}
_KINDS = {"str": "text", "int": "a number", "float": "a number", "bool": "a boolean"}
# What PyYAML quotes of a file, but for single characters and its own names of tokens (`<scalar>`).
_QUOTED = re.compile(r" ('(?!<)[^']{2,}'|\"(?!<)[^\"]{2,}\")|(?<=duplicate key) .*|;.*", re.DOTALL)
_MARK = "${"
_INDEX = re.compile(r"\[([^\[\]]*)\]")


def read_yaml(path: Path) -> DictConfig | ListConfig:
    """Return what a YAML file holds, references as they are; nothing that is no plain file is waited for.

    Raises:
        ValueError: saying what is wrong and where, with nothing of what the file holds.
        OSError: if it cannot be read.
    """
    text = _read_text(path)
    try:
        check_yaml(text, whole_file=True)
        loaded = OmegaConf.create(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{_place(error)}not valid YAML{_cause(error)}") from None
    except OmegaConfBaseException:
        raise ValueError("it holds a value or a key of a kind that no setting has") from None
    if not isinstance(loaded, DictConfig | ListConfig):
        raise TypeError(f"{path} was read as {type(loaded).__name__}")
    return loaded


def check_yaml(text: str, *, whole_file: bool = False) -> None:
    """Check that YAML holds nothing that is read otherwise than it looks.

    Args:
        text: the YAML.
        whole_file: whether it is a file: that is not a single word or number, and it is not quoted.

    Raises:
        ValueError: naming a number in base 60 (`1:30` is 90) or 8 (`010` is 8) that has no quotes, a tag
            that makes an object of some type, or values nested too deeply.
        yaml.YAMLError: if it is not YAML.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        for node, depth in _nodes(root):
            if depth > DEEPEST:
                raise RecursionError
            _check_node(node, quote=not whole_file)
        if whole_file and isinstance(root, yaml.ScalarNode) and not root.tag.endswith(":null"):
            kind = _KINDS.get(root.tag.rpartition(":")[2], "a single value")
            raise ValueError(f"{_at(root)}must be a mapping of sections, got {kind}")
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None


def check_references(values: Any) -> None:
    """Check that values refer to plain values of their own file alone.

    `${train.lr}` is another value. `${oc.env:NAME}` and the like would be read from outside, and end in
    reports and model cards; a reference to a value with references may be as large as one likes.

    Args:
        values: with references as they are.

    Raises:
        SettingError: with the key.
    """
    grown = 0
    for keys, text in _leaves(values):
        key = ".".join(keys)
        for reference in _references(text, key):
            target = str(_target(values, keys, reference))
            if _MARK in target:
                why = "refers to a value that itself refers to one"
                raise SettingError(Problem(key, why, hint="write it out"))
            grown += len(target)
            if grown > LARGEST_BYTES:
                why = f"with its references written out the file is over {LARGEST_BYTES} bytes"
                raise SettingError(Problem(key, why))


def _read_text(path: Path) -> str:
    """Return the text of a plain file, which is no pipe or device, and not too large for what it is."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
        if not S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a plain file")
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"it has more than {LARGEST_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8, from byte {error.start} on") from None


def _check_node(node: yaml.Node, *, quote: bool) -> None:
    where = f"line {node.start_mark.line + 1}: " if quote else _at(node)
    if node.tag not in _TAGS:
        tag = f"the tag {node.tag}" if quote else "this tag"
        raise ValueError(f"{where}{tag} is not allowed")
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return
    if not node.tag.endswith((":int", ":float")):
        return
    for form, base in ((_BASE_60, 60), (_OCTAL, 8)):
        if not form.fullmatch(node.value):
            continue
        what = f"{node.value} without quotes" if quote else "without quotes this"
        text = f"as '{node.value}'" if quote else "in quotes"
        raise ValueError(
            f"{where}{what} is a number in base {base}; write text {text}, and a number in base 10"
        )


def _at(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}: "


def _place(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    position = getattr(error, "position", None)
    return f"character {position + 1}: " if isinstance(position, int) else ""


def _cause(error: yaml.YAMLError) -> str:
    """Return what PyYAML says is wrong, without what it quotes of the file."""
    if "expansion exceeds" in str(error):
        return ": its aliases stand for too many values"
    if isinstance(error, yaml.MarkedYAMLError):
        parts = [_QUOTED.sub("", text or "") for text in (error.context, error.problem)]
        return "".join(f": {' '.join(part.split())}" for part in parts if part)
    return f": {error.reason}" if isinstance(error, yaml.reader.ReaderError) else ""


def _nodes(root: yaml.Node | None) -> Iterator[tuple[yaml.Node, int]]:
    """Yield each node once, with its depth."""
    seen: set[int] = set()
    waiting = [] if root is None else [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node, depth
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        for child in inner:
            pair = child if isinstance(child, tuple) else (child,)
            waiting += [(part, depth + 1) for part in pair]


def _leaves(values: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each text that has a reference, with its keys."""
    if isinstance(values, str):
        if _MARK in values:
            yield above, values
        return
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, Mapping):
        inner = values.items()
    elif isinstance(values, list):
        inner = enumerate(values)
    for key, value in inner:
        yield from _leaves(value, (*above, str(key)))


def _references(text: str, key: str) -> Iterator[str]:
    """Yield what a text refers to, as keys; refuse what reads from elsewhere."""
    try:
        waiting: list[Any] = [parse_references(text)]
    except OmegaConfBaseException:
        why = f"`{_MARK}` begins a reference to another value, and here is none"
        raise SettingError(Problem(key, why)) from None
    while waiting:
        node = waiting.pop()
        children = list(node.getChildren()) if hasattr(node, "getChildren") else []
        kind = type(node).__name__
        if kind == "InterpolationResolverContext":
            why = f"the resolver {_resolver(children)} is not allowed"
            hint = "${...} refers to other values of the configuration alone"
            raise SettingError(Problem(key, why, hint=hint))
        if kind == "InterpolationNodeContext":
            inner = node.getText()[len(_MARK) : -1]
            if _MARK in inner:
                raise SettingError(Problem(key, "holds a reference within a reference"))
            yield inner
        waiting += children


def _resolver(children: list[Any]) -> str:
    name = next((c.getText() for c in children if type(c).__name__ == "ResolverNameContext"), "")
    return repr(name)


def _target(values: Any, keys: tuple[str, ...], reference: str) -> Any:
    """Return what a reference names, None where there is nothing: OmegaConf says so."""
    path = _INDEX.sub(r".\1", reference)
    dots = len(path) - len(path.lstrip("."))
    above = list(keys[: len(keys) - dots]) if dots else []
    found = values
    for part in [*above, *filter(None, path.lstrip(".").split("."))]:
        if isinstance(found, Mapping):
            found = next((value for key, value in found.items() if str(key) == part), None)
        elif isinstance(found, list) and part.lstrip("-").isdigit():
            found = found[int(part)] if -len(found) <= int(part) < len(found) else None
        else:
            return None
    return found
