"""Hostile inputs, one process for all: each is refused, with its one line and nothing written."""

import os
from types import ModuleType

import pytest

from pipeline.errors import ConfigError
from tests.hostile import configuration, data
from tests.hostile.case import Case

KINDS = (configuration, data)

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=f"{kind.__name__.rpartition('.')[2]}-{case.name}")
        for kind in KINDS
        for case in kind.CASES
    ],
)
def test_it_is_refused_in_one_line(
    kind: ModuleType, case: Case, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    case.write({"run.yaml": kind.BASE})
    before = sorted(os.listdir())
    with pytest.raises(ConfigError) as caught:
        kind.read(case)
    assert str(caught.value).replace(f"{tmp_path}/", "") == case.line
    assert "\n" not in case.line
    assert sorted(os.listdir()) == before


def test_there_are_many_and_each_has_its_name():
    names = [f"{kind.__name__}-{case.name}" for kind in KINDS for case in kind.CASES]
    assert len(names) == len(set(names)) >= 200
