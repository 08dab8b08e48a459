"""How often processes of ours look for garbage: of real ones, in which nothing else was imported."""

import sys

import pytest

from tests.processes import run

_COUNT = """
import gc
passes = []
gc.callbacks.append(lambda phase, _: passes.append(phase))
{begin}
import transformers.modeling_utils
print(len(passes) // 2)
"""


def passes(begin: str) -> int:
    """Return how many collections there are while much is imported."""
    done = run([sys.executable, "-c", _COUNT.format(begin=begin)], timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_a_worker_passes_over_its_imports_a_tenth_as_often():
    assert passes("import launch.workers") < passes("") / 10
