"""Plain words of the field: what the project says is searched for words that only its authors know."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from launch.cli.main import app
from tests.processes import ROOT
from tests.sources import placed_strings_of, tracked

_WHO = "what|that|which|weights?|units?|blocks?|elements?|to|may|first|oldest|ones?|anything"
_WHERE = "to|from|into|through|by|with|over|back|in|on|wrong|via|past|up|down"
_PRUNED = rf"({_WHO}) (go|goes|went)(?! ({_WHERE})\b)"
# What must not be said, as a pattern, and what to say instead.
BANNED = {
    r"gangs?": "worker group",
    r"boards?": "status actor",
    r"cells?": "run (of a campaign), entry (of a table)",
    r"lessons?|taught": "distillation, distillation logits",
    r"pieces?": "shards, checkpoint shards, parts",
    r"witness(es)?": "replica group",
    r"(take|takes|taken|took|taking)( it| them)? up": "resume, resumed, restored",
    r"(go|goes|gone|going|went) on": "resume, continue",
    _PRUNED: "is pruned, is deleted",
    r"told": "reported, logged, announced",
    r"done before": "cached",
    r"there is$": "available",
    r"sent a (pruning|step)": "sent per pruning, per step",
    r"begun and not": "unfinished",
    r"(is|are|was|be|been) mended|mends?": "fix",
    r"(shows?|did not show)[^.]* (that it )?lives?": "lease expired (no heartbeat)",
    r"no step at all": "less than one optimizer step",
    r"so manieth": "every stride-th",
    r"in peace": "an uninterrupted run",
    r"rubbish": "garbage",
    r"dealt out|deals? out": "split, distributed",
}
PATTERNS = {
    re.compile(rf"(?<![\w-])({p})(?![\w-])", re.IGNORECASE): say for p, say in BANNED.items()
}
PACKAGES = ("mgpp", "pipeline", "launch")
# Where names of before are given, as code, to those who know them; and the keys that are refused.
NAMES_OF_BEFORE = ("CHANGELOG.md", "docs/migrating.md")
REFUSED_KEYS = {("pipeline/campaigns/config.py", "cells")}
# Files that people read, beside code.
TEXTS = [
    name
    for name in sorted(tracked())
    if name.endswith((".md", ".yaml", ".yml", ".jinja", ".cff", ".toml"))
    or name in ("Makefile", "launch/cluster/templates/grafana-dashboard.json")
]
MODULES = [
    name
    for name in sorted(tracked())
    if name.endswith(".py") and name.startswith((*PACKAGES, "docs"))
]


def problems_in(text: str) -> Iterator[str]:
    """Yield each banned word of a text, with what to say instead."""
    for pattern, say in PATTERNS.items():
        for match in pattern.finditer(text):
            yield f"{match[0]!r}; say {say}"


def helps() -> dict[str, str]:
    """Return the help of each command, by the words that name it."""
    found, left = {}, [(typer.main.get_command(app), "mgpp")]
    while left:
        command, name = left.pop()
        context = typer.Context(command, info_name=name)
        texts = [command.help or "", *(getattr(p, "help", "") or "" for p in command.params)]
        found[name] = "\n".join([*texts, command.get_usage(context)])
        left += [
            (inner, f"{name} {key}") for key, inner in getattr(command, "commands", {}).items()
        ]
    return found


@pytest.mark.parametrize("command", sorted(helps()))
def test_the_help_of_a_command_is_in_plain_words(command):
    assert list(problems_in(helps()[command])) == []


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_in_plain_words(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    if name in NAMES_OF_BEFORE:
        text = re.sub(r"`[^`\n]*`", "", text)
    lines = text.splitlines()
    found = [f"{name}:{i}: {p}" for i, line in enumerate(lines, 1) for p in problems_in(line)]
    assert found == []


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_says_is_in_plain_words(name):
    """Its docstrings, help texts, errors and log lines."""
    found = [
        f"{name}:{line}: {problem} in {text!r}"
        for line, text in placed_strings_of(Path(ROOT / name))
        if (name, text) not in REFUSED_KEYS
        for problem in problems_in(text)
    ]
    assert found == []


def test_banned_words_are_found_and_others_are_not():
    for wrong in (
        "the gang was lost",
        "a board of notes",
        "Run every cell",
        "masks taken up",
        "goes on from the last checkpoint",
        "how many units go",
        "The oldest go first",
        "this one did not show for a minute that it lives",
        "is no step at all",
    ):
        assert list(problems_in(wrong)), wrong
    for right in (
        "a Grafana dashboard",
        "cellular",
        "a piecewise linear",
        "sparsity goes to the other weights",
        "the dashboard is on loopback",
        "on-board",
    ):
        assert not list(problems_in(right)), right
