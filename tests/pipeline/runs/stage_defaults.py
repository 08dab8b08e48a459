"""Writes the defaults that each stage's key rests on beside the stage's version.

    python -m tests.pipeline.runs.stage_defaults

A key leaves out a setting that is at its default, so what a stage made before a default was changed must
not be found under the new one: the stage's version is raised with it.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic_core import to_jsonable_python

from pipeline.runs.config import RunConfig
from pipeline.runs.flow import STAGES
from pipeline.runs.stage import Stage, every
from pipeline.section import Section, sections_in

FILE = Path(__file__).with_suffix(".json")


def recorded_and_current() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file says, and what the code does: stage class -> its version and its defaults by key."""
    current = {
        type(stage).__name__: {"version": stage.version, "defaults": defaults_of(stage)}
        for stage in STAGES
    }
    return json.loads(FILE.read_text()) if FILE.exists() else {}, current


def defaults_of(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, settings in stage.settings.items():
        spec = RunConfig.model_fields[name]
        if not spec.is_required() and not isinstance(spec.default, Section):
            found[name] = spec.default
        for section in sections_in(spec.annotation):
            found |= _defaults(section, settings(section), name)
    return found


def _defaults(section: type[Section], names: Any, prefix: str) -> dict[str, Any]:
    for field, spec in section.model_fields.items():
        if get_origin(spec.annotation) is Literal and spec.is_required():
            (tag,) = spec.annotation.__args__
            prefix = f"{prefix}[{field}={tag}]"
    found: dict[str, Any] = {}
    for name in sorted(names):
        spec = section.model_fields.get(name)
        if spec is None:
            continue  # of another member of the union
        default = spec.get_default(call_default_factory=True)
        if not spec.is_required() and not isinstance(default, Section):
            found[f"{prefix}.{name}"] = to_jsonable_python(default, fallback=repr)
        for inner in sections_in(spec.annotation):
            found |= _defaults(inner, every(inner), f"{prefix}.{name}")
    return found


def complaints(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What must be done before the file may be written again, then what the file does not say yet."""
    found = []
    for name, now in current.items():
        before = recorded.get(name, {"version": None, "defaults": {}})
        changed = [
            f"{key} was {value!r}, is {now['defaults'][key]!r}"
            for key, value in before["defaults"].items()
            if key in now["defaults"] and now["defaults"][key] != value
        ]
        if changed and before["version"] == now["version"]:
            found.append(
                f"{name}: {'; '.join(changed)}: raise the stage's version, so that what the old default "
                f"made is not reused, and record the new defaults: python -m {__spec__.name}"
            )
        elif before != now:
            found.append(f"{name}: settings or version are new: python -m {__spec__.name}")
    return found


def main() -> None:
    recorded, current = recorded_and_current()
    refused = [
        text for text in complaints(recorded, current) if "raise the stage's version" in text
    ]
    if refused:
        raise SystemExit("\n".join(refused))
    FILE.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
