"""What a user imports is under `mgpp`, and stands beside modules of theirs that have our other names."""

import ast
import re
import sys

from tests.processes import ROOT, run

OURS = ("pipeline", "launch", "tests")
# Every module of mgpp but the kernels of GPUs.
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "mgpp").rglob("*.py")
    if "import triton" not in path.read_text()
)


def imported(code: str) -> set[str]:
    """Return the first names of the modules that some code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_a_script_beside_a_pipeline_of_its_own_imports_all_of_mgpp(tmp_path):
    for name in ("pipeline", "launch", "tests"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is no module of mgpp')\n")
    lines = [
        "import importlib, sys",
        "from mgpp.integrations.transformers import PruningCallback",
        f"for name in {MODULES}: importlib.import_module(name)",
        f"assert not {{*{OURS}}} & set(sys.modules), sys.modules",
        "import pipeline",
    ]
    (tmp_path / "script.py").write_text("\n".join(lines))
    command = [sys.executable, str(tmp_path / "script.py")]
    done = run(command, timeout=300, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    # Only the last line finds the script's neighbour: it is the one that Python takes.
    assert done.stderr.strip().splitlines()[-1] == "this is no module of mgpp"
    assert "Traceback" not in done.stderr


def texts():
    """Yield the code that users read, with its place."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield path.name, path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            yield path.name, block


def test_examples_and_documentation_import_mgpp_alone():
    codes = list(texts())
    assert sum("mgpp" in imported(code) for _, code in codes) >= 5
    for place, code in codes:
        assert not imported(code) & set(OURS), place


def test_processes_that_we_start_do_not_look_in_the_working_folder():
    """`python -c` and `python -m` do, unless `-P` forbids it."""
    found = [
        node
        for path in (*(ROOT / "launch").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.List) and "sys.executable" in map(ast.unparse, node.elts)
    ]
    assert found
    for node in found:
        assert ast.unparse(node.elts[1]) == "'-P'", ast.unparse(node)
