"""The examples, each run as it stands, and held to what the README shows of them."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def statements(code: str) -> list[str]:
    """Return the statements at the top of some code, comments and the form of lines left out."""
    return [ast.dump(node) for node in ast.parse(code).body]


def is_excerpt(code: str, of: str) -> bool:
    part, whole = statements(code), statements(of)
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.distributed
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prunes_exactly(path: Path, tmp_path: Path):
    command = [sys.executable]
    if path.stem == "deepspeed_loop":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "run_example.py"), str(path), str(tmp_path / "out")]
    env = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",  # tests/mgpp is not what the example imports
        "DS_ACCELERATOR": "cpu",
    }
    done = run(command, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"mgpp {ROOT / 'mgpp'}" in done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_short_and_says_how_to_run_it(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")


@pytest.mark.parametrize("page", ["README.md", "docs"])
def test_the_pages_show_excerpts_of_the_examples(page: str):
    pages = [ROOT / page] if page.endswith(".md") else sorted((ROOT / page).rglob("*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    loops = [code for code in blocks if "for batch in " in code or ".train()" in code]
    assert loops or page == "docs"
    examples = [path.read_text(encoding="utf-8") for path in EXAMPLES]
    for code in loops:
        assert any(is_excerpt(code, example) for example in examples), f"in no example:\n{code}"


def test_a_changed_statement_is_no_excerpt():
    code = "a = f(b, c=1)  # why\nfor d in a:\n    g(d)\n"
    assert is_excerpt(code, f"import f\n{code.replace('b, ', 'b,  ')}h()")
    assert not is_excerpt(code, code.replace("c=1", "c=2"))
    assert not is_excerpt(code, code.replace("for", "x = 1\nfor", 1))
