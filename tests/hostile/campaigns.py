"""Campaigns that cannot be meant."""

from typing import Any

from pipeline.campaigns.grid import read_campaign
from tests.hostile.case import Case

BASE = """\
name: grid
recipe: run.yaml
methods: {GMP: {prune: {method: {name: gmp}}}}
sparsities: [0.5]
"""


def read(case: Case) -> Any:
    """Read the campaign; `run.yaml` is BASE, which is its own recipe."""
    return read_campaign("run.yaml", case.overrides)


LINES = [
    ("list-for-methods", "methods=[]", "methods: must be a mapping, got []"),
    ("list-for-a-method", "methods.A=[]", "methods.A: must be a mapping of settings, got []"),
    ("number-for-a-method", "methods.A=1", "methods.A: must be a mapping of settings, got 1"),
    (
        "null-for-changes",
        "methods.A.changes=null",
        "methods.A.changes: must be a mapping, got None",
    ),
    (
        "no-candidates",
        "methods.A.candidates=[]",
        "methods.A.candidates: must have 1 or more entries, got []",
    ),
    (
        "list-as-candidate",
        "methods.A.candidates=[[]]",
        "methods.A.candidates.0: must be a mapping, got []",
    ),
    (
        "boolean-sparsity",
        "sparsities=[true]",
        "sparsities.0: input should be a valid number, got True",
    ),
    (
        "quoted-sparsity",
        "sparsities=['0.9']",
        "sparsities.0: input should be a valid number, got '0.9'; a number in quotes is text",
    ),
    (
        "percent-sparsity",
        "sparsities=[90]",
        "sparsities.0: input should be less than 1, got 90; it is a share: 90% is 0.9",
    ),
    ("number-for-sparsities", "sparsities=0.9", "sparsities: must be a list, got 0.9"),
    (
        "base-60-seed",
        "seeds=[1:30]",
        "'seeds=[1:30]': line 1: 1:30 without quotes is a number in base 60; write text as '1:30', and a number in base 10",
    ),
    ("boolean-seed", "seeds=[true]", "seeds.0: input should be a valid integer, got True"),
    ("fraction-seed", "seeds=[1.5]", "seeds.0: input should be a valid integer, got 1.5"),
    ("negative-seed", "seeds=[-1]", "seeds.0: input should be greater than or equal to 0, got -1"),
    (
        "huge-seed",
        "seeds=[4294967296]",
        "seeds.0: input should be less than 4294967296, got 4294967296",
    ),
    ("no-seeds", "seeds=[]", "seeds: must have 1 or more entries, got []"),
    ("number-for-seeds", "seeds=3", "seeds: must be a list, got 3"),
    (
        "boolean-runs-at-once",
        "runs_at_once=true",
        "runs_at_once: input should be a valid integer, got True",
    ),
    (
        "no-runs-at-once",
        "runs_at_once=0",
        "runs_at_once: input should be greater than or equal to 1, got 0",
    ),
    ("list-for-changes", "changes=[]", "changes: must be a mapping, got []"),
    (
        "number-key-of-changes",
        "changes={7: a}",
        "changes: a key of it: input should be a valid string, got 7",
    ),
    ("list-for-models", "models=[a]", "models: must be a mapping, got ['a']"),
    ("list-for-tasks", "tasks=[a]", "tasks: must be a mapping, got ['a']"),
    ("list-for-a-task", "tasks.a=[]", "tasks.a: must be a mapping of settings, got []"),
    ("list-for-selection", "selection=[]", "selection: must be a mapping of settings, got []"),
    (
        "selection-of-nothing",
        "selection={changes: {}}",
        "selection.changes: must have 1 or more entries",
    ),
    ("list-to-exclude", "exclude=[[]]", "exclude.0: must be a mapping of settings, got []"),
    ("exclude-all", "exclude=[{}]", "exclude[0]: empty, it would leave everything out"),
    (
        "exclude-no-method",
        "exclude=[{method: XYZ}]",
        "exclude[0].method: got 'XYZ'; allowed are GMP",
    ),
    ("number-as-run", "runs=[1]", "runs.0: must be a mapping of settings, got 1"),
    ("mapping-for-runs", "runs={a: b}", "runs: must be a list"),
    ("quoted-dense", "dense='no'", "dense: input should be a valid boolean, got 'no'"),
    ("list-for-recipe", "recipe=[]", "recipe: input should be a valid string, got []"),
    ("recipe-nowhere", "recipe=nowhere.yaml", "recipe: not a file, got 'nowhere.yaml'"),
    ("recipe-of-a-long-name", f"recipe={'a' * 5000}", f"recipe: not a file, got '{'a' * 296}..."),
    ("recipe-with-a-null-byte", 'recipe="a\\0b"', "recipe: not a file, got 'a\\x00b'"),
    (
        "unknown-key",
        "methos=1",
        "methos: unknown key; allowed are name, recipe, storage, changes, tasks, models, methods, sparsities, seeds, exclude, runs, selection, dense, export, curves, runs_at_once",
    ),
    (
        "open-list",
        "seeds=[",
        "'seeds=[': not valid YAML: while parsing a flow node expected the node content, but found '<stream end>' in \"<unicode string>\", line 1, column 2: [ ^",
    ),
]
CASES = [
    Case(
        name="no-methods",
        files={"run.yaml": "name: grid\nrecipe: run.yaml\nmethods: {}\n"},
        line="methods: must have 1 or more entries",
    ),
    *(Case(name=name, overrides=(override,), line=line) for name, override, line in LINES),
]
