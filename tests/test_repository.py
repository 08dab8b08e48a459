"""What the repository promises of itself."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run

LAYERS = {"mgpp": 0, "pipeline": 1, "launch": 2}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        above = {name for name in imports_of(path) if LAYERS.get(name, -1) > LAYERS[package]}
        assert not above, f"{path} imports {above}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("launch.workers.status_actor", {"torch"}),
        ("launch.workers.worker", {"torch"}),
        ("launch.workers.controller", set()),  # Ray Train itself imports torch there
    ],
)
def test_processes_beside_the_workers_import_nothing_heavy(module, heavy):
    heavy = heavy | {"transformers", "datasets", "deepspeed", "pipeline", "mgpp"}
    done = run([sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"], timeout=60)
    assert done.returncode == 0, done.stderr
    assert module in done.stdout.split()
    assert not heavy & set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("module", ["launch.cluster.jobs", "pipeline.store.maintenance"])
def test_commands_that_only_look_import_no_torch(module):
    done = run([sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"], timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "datasets"} & set(done.stdout.split())


def test_the_schema_in_the_repository_is_the_code_s_own():
    from pipeline.runs.config import json_schema

    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == json_schema()


def test_the_demo_s_configuration_is_valid_on_two_cores():
    os.environ["HF_HUB_OFFLINE"] = "1"
    from pipeline.runs.hardware import Capacity
    from pipeline.runs.validate import validate

    demo = validate(str(ROOT / "configs" / "demo.yaml"), [], Capacity(nodes=((2.0, 0.0),)))
    assert demo.prune.sparsity == 0.9
    assert demo.zero.stage == 2


def test_the_demo_uses_the_gpu_of_a_machine_with_one():
    os.environ["HF_HUB_OFFLINE"] = "1"
    from pipeline.runs.hardware import Capacity, Hardware, settled
    from pipeline.runs.validate import validate

    laptop = Capacity(nodes=((8.0, 1.0),))
    demo = validate(str(ROOT / "configs" / "demo.yaml"), [], laptop)
    demo = settled(demo, Hardware(capacity=laptop, has_bf16=lambda: True))
    assert (demo.cluster.gpus_per_worker, demo.zero.precision) == (1, "bf16")
