"""Imports between packages run downward only, and no package grows beyond a dozen modules.

The floors are the order of the packages, the top one first; packages on one floor do not import each
other. What each may import is listed: a new dependency between packages is a decision, not an accident.
"""

import ast
from pathlib import Path

import pytest

from tests.processes import ROOT

MAX_MODULES = 12
FLOORS = [
    "launch.cli",
    "launch.driver",
    "launch.workers",
    "launch.cluster launch.garbage",
    "pipeline.campaigns pipeline.planner",
    "pipeline.runs",
    "pipeline.benchmarks pipeline.evaluation pipeline.export",
    "pipeline.training",
    "pipeline.pruning",
    "pipeline.saving",
    "pipeline.data pipeline.models",
    "pipeline.context",
    "pipeline.reports pipeline.store pipeline.tasks pipeline.tracking",
    "pipeline.storage",
    "pipeline.host_memory pipeline.metric pipeline.section",
    "pipeline.worker_group",
    "pipeline.errors",
    "mgpp.integrations",
    "mgpp.sparse",
    "mgpp",
    "mgpp.attaching",
    "mgpp.backends",
    "mgpp.config",
    "mgpp.coverage mgpp.pruner",
    "mgpp.masking",
    "mgpp.methods",
    "mgpp.sharding",
    "mgpp.prior mgpp.prunable",
    "mgpp.kernels",
    "mgpp.schedule",
    "mgpp.duration mgpp.pattern mgpp.settings mgpp.tensor_file mgpp.version",
    "launch",
    "pipeline",
]
ALLOWED = {
    "launch.cli": (
        "launch.cluster launch.driver launch.garbage mgpp.sparse mgpp.version pipeline.benchmarks "
        "pipeline.campaigns pipeline.errors pipeline.planner pipeline.runs pipeline.storage "
        "pipeline.store pipeline.tasks"
    ),
    "launch.driver": (
        "launch.cluster launch.workers pipeline.campaigns pipeline.errors pipeline.metric "
        "pipeline.runs pipeline.storage pipeline.store pipeline.tasks pipeline.tracking"
    ),
    "launch.workers": (
        "launch.cluster launch.garbage pipeline.errors pipeline.models pipeline.runs pipeline.storage "
        "pipeline.store pipeline.training pipeline.worker_group"
    ),
    "launch.cluster": (
        "pipeline.campaigns pipeline.errors pipeline.planner pipeline.runs pipeline.section"
    ),
    "pipeline.campaigns": (
        "pipeline.errors pipeline.metric pipeline.reports pipeline.runs pipeline.section "
        "pipeline.store"
    ),
    "pipeline.planner": (
        "mgpp mgpp.masking mgpp.sharding pipeline.errors pipeline.evaluation pipeline.models "
        "pipeline.pruning pipeline.runs pipeline.saving pipeline.tasks pipeline.training"
    ),
    "pipeline.runs": (
        "mgpp pipeline.benchmarks pipeline.context pipeline.data pipeline.errors pipeline.evaluation "
        "pipeline.export pipeline.models pipeline.pruning pipeline.reports pipeline.saving "
        "pipeline.section pipeline.storage pipeline.store pipeline.tasks pipeline.tracking "
        "pipeline.training pipeline.worker_group"
    ),
    "pipeline.benchmarks": "mgpp.integrations mgpp.sparse pipeline.errors pipeline.reports",
    "pipeline.evaluation": (
        "pipeline.context pipeline.metric pipeline.models pipeline.section pipeline.tasks "
        "pipeline.training pipeline.worker_group"
    ),
    "pipeline.export": (
        "mgpp mgpp.sparse mgpp.tensor_file pipeline.errors pipeline.models pipeline.saving "
        "pipeline.section pipeline.storage"
    ),
    "pipeline.training": (
        "mgpp mgpp.backends mgpp.tensor_file pipeline.context pipeline.errors "
        "pipeline.host_memory pipeline.models pipeline.pruning pipeline.saving pipeline.section "
        "pipeline.storage pipeline.store pipeline.tasks pipeline.tracking pipeline.worker_group"
    ),
    "pipeline.pruning": (
        "mgpp mgpp.methods mgpp.pattern mgpp.settings mgpp.sharding mgpp.tensor_file "
        "pipeline.context pipeline.errors pipeline.models pipeline.saving pipeline.section "
        "pipeline.store pipeline.tasks pipeline.tracking pipeline.worker_group"
    ),
    "pipeline.saving": (
        "mgpp.backends mgpp.tensor_file pipeline.context pipeline.errors pipeline.models "
        "pipeline.storage pipeline.worker_group"
    ),
    "pipeline.models": (
        "mgpp.sparse pipeline.errors pipeline.section pipeline.storage pipeline.store "
        "pipeline.worker_group"
    ),
    "pipeline.data": (
        "pipeline.errors pipeline.section pipeline.storage pipeline.store pipeline.tasks"
    ),
    "pipeline.context": "pipeline.storage pipeline.store pipeline.tracking pipeline.worker_group",
    "pipeline.tasks": "pipeline.errors pipeline.metric pipeline.section",
    "pipeline.store": "pipeline.errors pipeline.storage pipeline.worker_group",
    "pipeline.host_memory": "pipeline.worker_group",
    "pipeline.tracking": "pipeline.metric",
    "pipeline.reports": "mgpp pipeline.metric",
    "pipeline.section": "mgpp pipeline.errors",
    "mgpp.integrations": "mgpp mgpp.config mgpp.sparse",
    "mgpp.sparse": "mgpp.sharding mgpp.tensor_file",
    "mgpp": (
        "mgpp.attaching mgpp.config mgpp.coverage mgpp.duration mgpp.masking mgpp.methods "
        "mgpp.prior mgpp.prunable mgpp.pruner mgpp.schedule mgpp.sharding mgpp.version"
    ),
    "mgpp.attaching": "mgpp.backends mgpp.config mgpp.prunable mgpp.pruner",
    "mgpp.backends": "mgpp.masking mgpp.methods mgpp.pruner mgpp.schedule mgpp.sharding",
    "mgpp.config": (
        "mgpp.duration mgpp.masking mgpp.methods mgpp.prunable mgpp.schedule mgpp.settings"
    ),
    "mgpp.coverage": "mgpp.prunable",
    "mgpp.pruner": "mgpp.masking mgpp.methods mgpp.schedule mgpp.sharding",
    "mgpp.masking": (
        "mgpp.kernels mgpp.methods mgpp.pattern mgpp.schedule mgpp.settings mgpp.sharding"
    ),
    "mgpp.methods": (
        "mgpp.kernels mgpp.pattern mgpp.prior mgpp.schedule mgpp.settings mgpp.sharding"
    ),
    "mgpp.prior": "mgpp.kernels",
    "mgpp.sharding": "mgpp.kernels",
    "mgpp.schedule": "mgpp.settings",
    "pipeline.storage": "pipeline.errors",
}


def node(module: str) -> str:
    """Return the package or top-level module that a module belongs to: its first two names."""
    return ".".join(module.split(".")[:2])


def modules_of(path: Path) -> set[str]:
    """Return the modules of this repository that a file imports."""
    found = set()
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            # A name that is a module counts as one: `from pipeline.models import weights`.
            names = {f"{statement.module}.{alias.name}" for alias in statement.names}
            modules = {name for name in names if is_module(name)}
            found |= modules or {statement.module}
    return {name for name in found if name.split(".")[0] in ("launch", "pipeline", "mgpp")}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports() -> dict[str, set[str]]:
    """Return what each package or top-level module imports of the others."""
    found: dict[str, set[str]] = {}
    for top in ("launch", "pipeline", "mgpp"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            importer = node(name)
            found.setdefault(importer, set())
            found[importer] |= {node(module) for module in modules_of(path)} - {importer}
    return found


def floor_of(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor.split())


def test_imports_between_packages_are_the_listed_ones():
    actual = {name: sorted(others) for name, others in imports().items() if others}
    assert actual == {name: sorted(others.split()) for name, others in ALLOWED.items()}


@pytest.mark.parametrize("importer", ALLOWED)
def test_imports_run_downward(importer):
    upward = [name for name in ALLOWED[importer].split() if floor_of(name) <= floor_of(importer)]
    assert not upward, f"{importer} imports {upward}, which do not stand below it"


def test_every_package_stands_on_a_floor():
    names = [name for floor in FLOORS for name in floor.split()]
    assert sorted(names) == sorted(imports())


def test_an_upward_import_and_a_cycle_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("from launch.driver import run\nimport pipeline.runs.flow\nimport os\n")
    assert modules_of(path) == {"launch.driver.run", "pipeline.runs.flow"}
    assert floor_of("launch.driver") < floor_of("pipeline.runs") < floor_of("mgpp.methods")


def test_no_package_has_more_modules_than_one_takes_in():
    for top in ("launch", "pipeline", "mgpp"):
        for folder in [ROOT / top, *(p for p in (ROOT / top).rglob("*") if p.is_dir())]:
            modules = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
            assert len(modules) <= MAX_MODULES, f"{folder}: {len(modules)} modules"
