"""Training and evaluation run where little is installed, as on a machine that was lent for an hour."""

import sys

import pytest

from tests.few_packages import NEEDED, NOT_NEEDED, only
from tests.processes import run

MODULES = ("pipeline.training.loop", "pipeline.evaluation.evaluate")
IMPORTS = f"import {', '.join(MODULES)}"


@pytest.mark.slow
def test_training_and_evaluation_import_without_datasets_ray_and_omegaconf():
    done = run([sys.executable, "-c", IMPORTS], timeout=120, env=only(NEEDED, NOT_NEEDED))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_what_is_hidden_cannot_be_imported():
    find = "from importlib.util import find_spec; import torch; print(*map(find_spec, {!r}))"
    command = [sys.executable, "-c", find.format(NOT_NEEDED)]
    done = run(command, timeout=120, env=only(NEEDED, NOT_NEEDED))
    assert done.stdout.split() == ["None"] * len(NOT_NEEDED), done.stderr[-3000:]
