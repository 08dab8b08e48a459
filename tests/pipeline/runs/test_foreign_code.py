"""Code that a configuration names: without permission it is found by name, and not run."""

import json
import sys

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.main import app
from pipeline.data.function import FunctionConfig
from pipeline.data.joined import JoinedConfig
from pipeline.data.lexicon import load_words
from pipeline.runs.foreign_code import OWN_FUNCTIONS, foreign_code, name_problems

ROWS = """
open({marker!r}, 'a').write('imported ')
from datasets import Dataset, DatasetDict

def load(**_):
    open({marker!r}, 'a').write('called')
    rows = {{'text': ['a good day', 'a bad day'] * 16, 'label': [1, 0] * 16}}
    return DatasetDict(train=Dataset.from_dict(rows))
"""
CODE = """
open({marker!r}, 'a').write('imported ')
from transformers import BertConfig

class MineConfig(BertConfig):
    model_type = 'mine'
"""


@pytest.fixture
def folder(tmp_path, tiny_bert, words_csv, monkeypatch, datasets_cache):
    """A working folder with code of its own, and the file that running it writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = str(tmp_path / "marker")
    (tmp_path / "package" / "inner").mkdir(parents=True)
    for name in (
        "mine.py",
        "package/__init__.py",
        "package/inner/__init__.py",
        "package/inner/rows.py",
    ):
        (tmp_path / name).write_text(ROWS.format(marker=marker))
    values = {
        "name": "small",
        "storage": str(tmp_path / "runs"),
        "model": {"path": str(tiny_bert)},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 8},
        "data": {"source": "files", "train": str(words_csv)},
        "train": {"length": 8, "batch_size": 8},
        "prune": {"sparsity": 0.5},
        "cluster": {"gpus_per_worker": 0},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("mine", "package", "package.inner", "package.inner.rows"):
        sys.modules.pop(name, None)


def function(name, /, **arguments):
    return f"data={json.dumps({'source': 'function', 'function': name, 'arguments': arguments})}"


def call(*command):
    done = CliRunner().invoke(app, list(command))
    return done.exit_code, done.stdout, done.stderr


FOREIGN = [
    ("os:system", {"command": "echo > marker"}),
    ("subprocess:getoutput", {"cmd": "echo > marker"}),
    ("builtins:exec", {}),
    ("mine:load", {}),
    ("package.inner.rows:load", {}),
    (
        "pipeline.data.function:import_module",
        {"name": "mine"},
    ),  # of ours, and runs what it is given
]


@pytest.mark.parametrize(("name", "arguments"), FOREIGN)
def test_validate_runs_nothing_that_a_configuration_names(folder, name, arguments, capfd):
    code, out, _ = call("validate", "run.yaml", function(name, **arguments))
    assert code == 0
    assert f"not checked: data.function {name}: the data, and the keys that follow from it; " in out
    assert "prune-" not in out
    assert "  data " not in out
    joined = {"source": "joined", "parts": [{"source": "function", "function": name}]}
    assert call("validate", "run.yaml", f"data={json.dumps(joined)}", "--json")[0] == 0
    out = capfd.readouterr().out
    assert json.loads(out)["unchecked"] == ["data.parts.0.function"]
    assert json.loads(out)["keys"] == {}
    assert not (folder / "marker").exists()


@pytest.mark.parametrize(
    "command",
    [
        "run run.yaml",
        "campaign c.yaml",
        "campaign status c.yaml",
        "submit run.yaml storage=/mnt/runs",
        "submit c.yaml --campaign storage=/mnt/runs",
        "cluster render slurm run.yaml storage=/mnt/runs --output made",
        "validate after.yaml",
    ],
)
def test_every_command_that_would_run_it_says_what_to_do(folder, command):
    values = yaml.safe_load((folder / "run.yaml").read_text())
    values["data"] = {"source": "function", "function": "mine:load"}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    after = {**values, "data": {"source": "files", "train": "rows.csv"}}
    after["model"] = {"path": "run:run.yaml"}
    (folder / "after.yaml").write_text(yaml.safe_dump(after))
    (folder / "rows.csv").write_text("text,label\n" + "a good day,1\na bad day,0\n" * 16)
    campaign = {"name": "c", "recipe": "run.yaml", "methods": {"m": {}}, "sparsities": [0.5]}
    (folder / "c.yaml").write_text(yaml.safe_dump(campaign))
    code, _, said = call(*command.split())
    assert code == 2, said
    why = "data.function: a function from outside of mgpp is not run unless allowed"
    assert f"{why}, got 'mine:load'" in said
    assert "give --allow-code if it may run" in said
    assert not (folder / "marker").exists()
    assert not (folder / "runs").exists()


def test_with_permission_it_is_run(folder):
    code, out, said = call("validate", "run.yaml", function("mine:load"), "--allow-code")
    assert code == 0, said
    assert "not checked" not in out
    assert (folder / "marker").read_text().startswith("imported called")
    assert sys.path[-1] == str(folder)
    assert sys.path.count(str(folder)) == 1


def test_a_configuration_cannot_give_the_permission(folder):
    for values in ("allow_code: true", "prune: {allow_code: true}"):
        (folder / "own.yaml").write_text(f"extends: run.yaml\n{values}\n")
        code, _, said = call("run", "own.yaml", function("mine:load"))
        assert code == 2
        assert "allow_code: " in said
    assert not (folder / "marker").exists()


def test_a_plan_needs_no_rows(folder):
    assert call("plan", "run.yaml", function("mine:load"))[0] == 0
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_code_that_comes_with_a_model_is_not_run_either(folder, tiny_bert, command):
    mine = folder / "bert"
    mine.mkdir()
    for file in tiny_bert.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    settings = json.loads((mine / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.MineConfig"}}
    (mine / "config.json").write_text(json.dumps(settings))
    (mine / "code.py").write_text(CODE.format(marker=str(folder / "marker")))
    given = ["run.yaml", f"model.path={mine}", "model.trust_remote_code=true"]
    code, out, said = call(command, *given)
    if command == "validate":
        assert code == 0, said
        assert "not checked: model.trust_remote_code: the model, and the keys that follow" in out
    else:
        assert code == 2
        assert "model.trust_remote_code: code that comes with the model is not run unless" in said
    assert not (folder / "marker").exists()
    call("plan", *given, "--allow-code")
    assert (folder / "marker").exists()


def problems_of(name):
    config = FunctionConfig(source="function", function=name)
    return [problem.why for problem in name_problems({"data": config})]


def test_a_name_is_looked_up_without_running_its_file(folder):
    (folder / "other.py").write_text(
        "raise SystemExit\nif 1:\n    def within(): ...\ntry:\n    from x import y as tried\n"
        "except ImportError:\n    tried = None\nfor loop, (a, b) in []: pass\nmade: int = 3\n"
        "class Kept: ...\ndef outer():\n    def hidden(): ...\n    local = 1\n"
    )
    (folder / "star.py").write_text("from os import *\n")
    (folder / "broken.py").write_text("def load(:\n    password = 'hunter2'\n")
    (folder / "space").mkdir()
    (folder / "space" / "rows.py").write_text("def load(): ...\n")
    for name in ("within", "tried", "loop", "a", "b", "made", "Kept", "outer"):
        assert problems_of(f"other:{name}") == []
    for name in ("star:anything", "space.rows:load", "math:sin", "json.decoder:JSONDecoder"):
        assert problems_of(name) == []
    for name in ("hidden", "local", "load"):
        assert problems_of(f"other:{name}") == [f"{folder / 'other.py'} has no {name!r}"]
    for name in ("nowhere:load", "package.nowhere:load", "mine.inner:load", "sys.inner:x"):
        assert problems_of(name) == [f"there is no module {name.partition(':')[0]!r}"]
    for name in ("..mine:load", "a..b:load", ".:load"):
        assert problems_of(name) == [f"there is no module {name.partition(':')[0]!r}"]
    assert problems_of("broken:load") == [f"{folder / 'broken.py'} is no Python: line 1"]
    assert not (folder / "marker").exists()
    assert "package" not in sys.modules


def test_a_wrong_name_is_refused_by_validate(folder):
    code, _, said = call("validate", "run.yaml", function("mine:laod"))
    assert code == 2
    assert said.startswith(f"error: data.function: {folder / 'mine.py'} has no 'laod'")
    assert not (folder / "marker").exists()


def test_functions_of_mgpp_s_own_need_no_permission():
    assert {f"{load_words.__module__}:{load_words.__name__}"} == OWN_FUNCTIONS
    own = FunctionConfig(source="function", function=min(OWN_FUNCTIONS))
    joined = JoinedConfig(source="joined", parts=[own])
    assert foreign_code({"data": own}) == foreign_code({"data": joined}) == []


def test_a_package_is_found_without_importing_one_above_it(folder):
    code, _, said = call("validate", "run.yaml", "model.path=package:package.inner/bert")
    assert code == 2
    assert "package 'package.inner' is not installed" in said
    assert not (folder / "marker").exists()
