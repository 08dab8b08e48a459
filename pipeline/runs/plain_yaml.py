"""YAML that means what it looks like: what YAML 1.1 reads as something else is refused."""

import re
from collections.abc import Iterator

import yaml

DEEPEST = 32
_BASE_60 = re.compile(r"[-+]?[0-9_]+(:[0-9_]+)+(\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp", "value")
}


def check_yaml(text: str, *, whole_file: bool = False) -> None:
    """Check that YAML holds nothing that is read otherwise than it looks.

    Args:
        text: the YAML.
        whole_file: whether it is a file, which is not a single word or number.

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
            _check_node(node)
        if whole_file and isinstance(root, yaml.ScalarNode) and not root.tag.endswith(":null"):
            raise ValueError(f"must be a mapping of sections, got {root.value!r}")
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None


def _check_node(node: yaml.Node) -> None:
    line = node.start_mark.line + 1
    if node.tag not in _TAGS:
        raise ValueError(f"line {line}: the tag {node.tag} is not allowed")
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return
    if not node.tag.endswith((":int", ":float")):
        return
    for form, base in ((_BASE_60, 60), (_OCTAL, 8)):
        if form.fullmatch(node.value):
            raise ValueError(
                f"line {line}: {node.value} without quotes is a number in base {base}; write text as "
                f"'{node.value}', and a number in base 10"
            )


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
