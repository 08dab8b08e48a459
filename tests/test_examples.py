"""The examples, each run as it stands, and held to what the README shows of them."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def lines_of(code: str) -> list[str]:
    """Return the lines of code without comments at their ends and without empty lines."""
    return [line for raw in code.splitlines() if (line := raw.split("  #")[0].rstrip())]


def is_excerpt(code: str, of: str) -> bool:
    part, whole = lines_of(code), lines_of(of)
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.distributed
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prunes_exactly(path: Path, tmp_path: Path):
    command = [sys.executable, "-P"]
    if path.stem == "deepspeed_loop":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "run_example.py"), str(path), str(tmp_path / "out")]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = run(command, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"mgpp {ROOT / 'mgpp'}" in done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_short_and_says_how_to_run_it(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")


def test_the_readme_shows_excerpts_of_the_examples():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    loops = [code for code in blocks if "mgpp.attach(" in code or "PruningCallback(" in code]
    assert loops
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES]
    for code in loops:
        assert any(is_excerpt(code, text) for text in texts), f"in no example:\n{code}"


def test_a_changed_line_is_no_excerpt():
    text = EXAMPLES[0].read_text(encoding="utf-8")
    assert is_excerpt("\n".join(text.splitlines()[-4:]), text)
    assert not is_excerpt(text.replace("sparsity", "sparseness"), text)
