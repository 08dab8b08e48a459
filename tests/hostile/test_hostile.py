"""Hostile inputs, one process for all: each is refused, with its one line and nothing written."""

import os
from types import ModuleType

import pytest
from typer.testing import CliRunner

from launch.cli.main import app
from pipeline.errors import ConfigError
from tests.hostile import campaigns, configuration, data, rendering
from tests.hostile.case import Case

KINDS = (configuration, campaigns, rendering, data)

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


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("plan run.yaml model=[]", "model: must be a mapping of settings, got []"),
        ("plan run.yaml data.train=[]", "data.train: must have 1 or more entries, got []"),
        ("plan run.yaml train.lr=true", "train.lr: input should be a valid number, got True"),
        (
            "plan run.yaml train.length=1:30",
            "'train.length=1:30': line 1: 1:30 without quotes is a number in base 60; write text as "
            "'1:30', and a number in base 10",
        ),
        pytest.param(f"plan {'a' * 5000}", f"{'a' * 297}...: no such file", id="long-path"),
        (
            "cluster render slurm run.yaml --set partition=[",
            "--set partition=[: not valid YAML: while parsing a flow node expected the node content, but "
            "found '<stream end>' in \"<unicode string>\", line 1, column 2: [ ^",
        ),
    ],
)
def test_the_command_line_says_it_and_exits_with_2(command, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Case(name="", line="").write({"run.yaml": configuration.BASE})
    done = CliRunner().invoke(app, command.split())
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {line}\n")
