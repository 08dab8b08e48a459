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
    ("no-methods", "methods={}", "?"),
    ("list-for-methods", "methods=[]", "?"),
    ("list-for-a-method", "methods.A=[]", "?"),
    ("number-for-a-method", "methods.A=1", "?"),
    ("null-for-changes", "methods.A.changes=null", "?"),
    ("no-candidates", "methods.A.candidates=[]", "?"),
    ("list-as-candidate", "methods.A.candidates=[[]]", "?"),
    ("boolean-sparsity", "sparsities=[true]", "?"),
    ("quoted-sparsity", "sparsities=['0.9']", "?"),
    ("percent-sparsity", "sparsities=[90]", "?"),
    ("number-for-sparsities", "sparsities=0.9", "?"),
    ("base-60-seed", "seeds=[1:30]", "?"),
    ("boolean-seed", "seeds=[true]", "?"),
    ("fraction-seed", "seeds=[1.5]", "?"),
    ("negative-seed", "seeds=[-1]", "?"),
    ("huge-seed", "seeds=[4294967296]", "?"),
    ("no-seeds", "seeds=[]", "?"),
    ("number-for-seeds", "seeds=3", "?"),
    ("boolean-runs-at-once", "runs_at_once=true", "?"),
    ("no-runs-at-once", "runs_at_once=0", "?"),
    ("list-for-changes", "changes=[]", "?"),
    ("number-key-of-changes", "changes={7: a}", "?"),
    ("list-for-models", "models=[a]", "?"),
    ("list-for-tasks", "tasks=[a]", "?"),
    ("list-for-a-task", "tasks.a=[]", "?"),
    ("list-for-selection", "selection=[]", "?"),
    ("selection-of-nothing", "selection={changes: {}}", "?"),
    ("list-to-exclude", "exclude=[[]]", "?"),
    ("exclude-all", "exclude=[{}]", "?"),
    ("exclude-no-method", "exclude=[{method: XYZ}]", "?"),
    ("number-as-run", "runs=[1]", "?"),
    ("mapping-for-runs", "runs={a: b}", "?"),
    ("quoted-dense", "dense='no'", "?"),
    ("list-for-recipe", "recipe=[]", "?"),
    ("recipe-nowhere", "recipe=nowhere.yaml", "?"),
    ("recipe-of-a-long-name", "recipe=" + "a" * 5000, "?"),
    ("recipe-with-a-null-byte", 'recipe="a\\0b"', "?"),
    ("unknown-key", "methos=1", "?"),
    ("open-list", "seeds=[", "?"),
]
CASES = [Case(name=name, overrides=(override,), line=line) for name, override, line in LINES]
