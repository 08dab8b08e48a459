"""Reference pages made from the code as they are built, so that they cannot differ from it.

A page holds `<!-- generated: NAME -->` where one of these goes: `configuration`, `campaign`, `settings`,
`commands`, `api`.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

_MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def configuration() -> str:
    """Return every section of a run's configuration: key, type, default, meaning."""
    from pipeline.runs.config import json_schema

    schema = json_schema()
    required = next(entry["required"] for entry in schema["anyOf"] if "name" in entry["required"])
    sections = {k: v for k, v in schema["properties"].items() if _kinds(v, schema)}
    plain = {k: v for k, v in schema["properties"].items() if k not in sections}
    parts = ["## Top level", _table({"properties": plain, "required": required}, schema)]
    for name, value in sections.items():
        parts += _section(name, value, schema, level=2)
    return "\n\n".join(parts)


def campaign() -> str:
    """Return every key of a campaign's file, and of what its lists and mappings hold."""
    from pipeline.campaigns.config import CampaignConfig

    schema = CampaignConfig.model_json_schema()
    parts = [_table(schema, schema)]
    for name, value in schema["properties"].items():
        for kind in _entries(value, schema):
            parts += [f"### {name}", _text(kind["description"]), _table(kind, schema)]
    return "\n\n".join(parts)


def settings() -> str:
    """Return the settings of `mgpp.PruningConfig`: key, default, meaning."""
    import mgpp
    from mgpp.settings import default_of

    rows = ["| key | default | meaning |", "|---|---|---|"]
    for entry in mgpp.settings_of(mgpp.PruningConfig):
        description = _text(entry.metadata["description"])
        rows.append(f"| `{entry.name}` | `{default_of(entry)}` | {description} |")
    return "\n".join(rows)


def commands() -> str:
    """Return every command of the command line: its usage, arguments and options."""
    import typer

    from launch.cli.main import app

    return "\n\n".join(part for p in _commands(typer.main.get_command(app), "mgpp") for part in p)


def api() -> str:
    """Return the autodoc directives of all that `mgpp` exports, functions and classes apart."""
    import mgpp

    kinds: dict[str, list[str]] = {"Functions": [], "Classes": []}
    for name in sorted(mgpp.__all__, key=str.casefold):
        value = getattr(mgpp, name)
        if inspect.isclass(value):
            kinds["Classes"].append(f".. autoclass:: mgpp.{name}\n   :members:\n")
        elif callable(value):
            kinds["Functions"].append(f".. autofunction:: mgpp.{name}\n")
    blocks = {kind: "\n".join(entries) for kind, entries in kinds.items()}
    return "\n\n".join(
        f"## {kind}\n\n```{{eval-rst}}\n{block}```" for kind, block in blocks.items()
    )


def _section(name: str, value: dict[str, Any], schema: dict[str, Any], level: int) -> list[str]:
    """Return a section's heading, description and table, and those of the kinds it may be of."""
    kinds = _kinds(value, schema)
    heading = "#" * level
    if len(kinds) == 1 and "discriminator" not in value:
        (kind,) = kinds.values()
        parts = [f"{heading} {name}", _text(kind["description"]), _table(kind, schema)]
        for key, inner in kind["properties"].items():
            if "discriminator" in inner:
                parts += _section(f"{name}.{key}", inner, schema, level + 1)
        return parts
    tag = value["discriminator"]["propertyName"]
    names = ", ".join(f"`{kind}`" for kind in kinds)
    parts = [
        f"{heading} {name}",
        f"{_text(value['description'])} `{name}.{tag}` is one of {names}.",
    ]
    for kind_name, kind in kinds.items():
        parts += [
            f"{heading}# {name}.{tag}: {kind_name}",
            _text(kind["description"]),
            _table(kind, schema),
        ]
    return parts


def _kinds(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections that a key may hold, by the name of their kind; none for a plain key."""
    if "discriminator" in value:
        found = value["discriminator"]["mapping"]
        order = [option["$ref"] for option in value["oneOf"]]
        found = dict(sorted(found.items(), key=lambda item: order.index(item[1])))
    else:
        options = [value, *value.get("anyOf", [])]
        found = {o["$ref"]: o["$ref"] for o in options if "$ref" in o}
    return {name: schema["$defs"][ref.rpartition("/")[2]] for name, ref in found.items()}


def _entries(value: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sections that a key holds, itself or in a list or mapping."""
    inner = [value, value.get("items", {}), value.get("additionalProperties", {})]
    options = [option for option in inner if isinstance(option, dict)]
    return [kind for option in options for kind in _kinds(option, schema).values()]


def _table(kind: dict[str, Any], schema: dict[str, Any]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in kind["properties"].items():
        if "const" in value:
            continue  # the heading says it
        default = "required" if key in kind.get("required", []) else _default(value)
        cells = (f"`{key}`", _type(value), default, _text(value.get("description", "")))
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else "No settings."


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return ""
    default = value["default"]
    if "discriminator" in value:
        return f"`{default[value['discriminator']['propertyName']]}`"
    if default is None:
        return "null"
    texts = {True: "true", False: "false"} if isinstance(default, bool) else {}
    return f"`{texts.get(default) if texts else default}`"


def _type(value: dict[str, Any]) -> str:
    """Return a type in words: a number's limits, a list's entries, a choice's names."""
    if "discriminator" in value:
        return "section, below"
    options = value.get("anyOf")
    if options:
        if any("ep|%" in option.get("pattern", "") for option in options):
            words = ["[length](#lengths)"]
        else:
            words = [_type(option) for option in options if option.get("type") != "null"]
        null = [option for option in options if option.get("type") == "null"]
        return " or ".join([*words, *(["null"] if null else [])])
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    kind = {"array": "list", "object": "mapping"}.get(
        value.get("type", ""), value.get("type", "any")
    )
    if kind == "list" and "items" in value:
        kind = f"list of {_type(value['items'])}"
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    given = [f"{words} {value[key]:g}" for key, words in limits.items() if key in value]
    return ", ".join([kind, *given])


def _commands(command: Any, name: str) -> Iterator[list[str]]:
    import typer

    if getattr(command, "hidden", False):
        return
    if hasattr(command, "commands"):
        if command.help and name != "mgpp":
            yield [f"## {name}", _text(command.help)]
        for inner, entry in command.commands.items():
            yield from _commands(entry, f"{name} {inner}")
        return
    context = typer.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    paragraphs = [_text(part) for part in (command.help or "").split("\n\n")]
    level = "##" if name.count(" ") == 1 else "###"
    parts = [f"{level} {name}", f"```text\n{usage}\n```", *paragraphs]
    rows = []
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        shown = " ".join(parameter.opts) if parameter.param_type_name == "option" else None
        label = shown or parameter.metavar or parameter.name.upper()
        default = getattr(parameter, "default", None)
        default = "" if default in (None, False, ()) else f" Default: `{default}`."
        rows.append(f"| `{label}` | {_text(parameter.help or '')}{default} |")
    if rows:
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
    yield parts


def _text(text: str) -> str:
    return " ".join(text.split())


PAGES: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "campaign": campaign,
    "settings": settings,
    "commands": commands,
    "api": api,
}


def insert(app: Any, page: str, source: list[str]) -> None:
    """Replace a page's markers by what they name."""
    source[0] = _MARKER.sub(lambda match: PAGES[match[1]](), source[0])


def as_rst(app: Any, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the code's docstrings, where `x` is code and |x| a magnitude, into reStructuredText."""
    for i, line in enumerate(lines):
        parts = re.split(r"(?<!`)`([^`]+)`(?![`_])", line)
        lines[i] = "".join(
            f"``{part}``" if at % 2 else re.sub(r"(?<!\\)\|", r"\\|", part)
            for at, part in enumerate(parts)
        )


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", insert)
    app.connect("autodoc-process-docstring", as_rst)
    return {"parallel_read_safe": True}
