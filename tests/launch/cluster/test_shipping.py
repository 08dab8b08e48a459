"""What a job would not have of the working folder is told before it is submitted."""

import os
import zipfile

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.dashboard.utils import get_address_for_submission_client
from typer.testing import CliRunner

from launch.cli.main import app
from launch.cluster.connect import address_of
from launch.cluster.jobs import connect
from launch.cluster.shipping import Shipment
from launch.cluster.submission import EXCLUDES, make_submission
from pipeline.errors import ConfigError
from pipeline.runs.config import ClusterConfig

RUN = {
    "name": "tiny",
    "storage": "/shared/runs",
    "model": {"path": "bert"},
    "task": {"type": "classification", "text": ["text"], "label": "label"},
    "data": {"source": "files", "train": "rows/train.csv"},
    "prune": {"sparsity": 0.5},
}


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A working folder with all that its configuration names."""
    made = tmp_path / "work"
    names = ["rows/train.csv", "rows/dev.csv", "bert/config.json", "bert/model.safetensors"]
    write(made, {**dict.fromkeys(names, "x"), "run.yaml": yaml.safe_dump(RUN)})
    return made


def problems(folder, *overrides, config="run.yaml", **settings):
    with pytest.raises(ConfigError) as caught:
        make_submission(str(folder / config), overrides, working_dir=str(folder), **settings)
    return [str(problem).replace(str(folder), "FOLDER") for problem in caught.value.problems]


def test_a_folder_with_all_that_is_named_is_taken(folder):
    write(folder, {".gitignore": "*.log\n/other/\n", "rows/.gitignore": "cache\n"})
    made = make_submission(str(folder / "run.yaml"), [], working_dir=str(folder))
    assert made.entrypoint == "mgpp run run.yaml"


def test_a_job_may_run_code_only_if_who_submits_it_says_so(folder):
    values = {**RUN, "data": {"source": "function", "function": "mine:load"}}
    write(folder, {"mine.py": "raise SystemExit('imported')", "own.yaml": yaml.safe_dump(values)})
    (found,) = problems(folder, config="own.yaml")
    assert found.startswith("data.function: a function from outside of mgpp is not run unless")
    assert "--allow-code" in found
    for hidden in ("allow_code=true", "allow_code=yes"):
        found = problems(folder, hidden, config="own.yaml")
        assert found[0].startswith(
            "allow_code: is the option --allow-code of a command, and no key"
        )
    made = make_submission(
        str(folder / "own.yaml"), [], working_dir=str(folder), allow_code=True, excludes=["x"]
    )
    assert made.entrypoint == "mgpp run --allow-code own.yaml"


@pytest.mark.parametrize("place", ["pipeline.py", "launch/__init__.py", "mgpp.py"])
def test_a_module_that_a_job_would_take_for_mgpp_s_is_refused(folder, place):
    write(folder, {place: "raise SystemExit('this is no module of mgpp')", "launch/notes.txt": "x"})
    (found,) = problems(folder)
    assert found.startswith(f"{place}: jobs would import it instead of mgpp's own; rename it, or")
    make_submission(str(folder / "run.yaml"), [], working_dir=str(folder), excludes=[place])
    # A checkout of mgpp has them all, and a folder of other files is no module.
    write(folder, {f"{name}/py.typed": "" for name in ("launch", "pipeline", "mgpp")})
    make_submission(str(folder / "run.yaml"), [], working_dir=str(folder))


@pytest.mark.parametrize(
    "ignored",
    [
        {".gitignore": "rows/\n"},
        {".gitignore": "rows\n"},
        {".gitignore": "*.csv\n"},
        {".gitignore": "**/train.csv\n"},
        {"rows/.gitignore": "/train.csv\n"},
        {"rows/.gitignore": "*\n"},
        {".rayignore": "rows\n"},
    ],
)
def test_an_ignored_file_is_refused(folder, ignored):
    write(folder, ignored)
    found = problems(folder)
    assert found == [
        "data.train: rows/train.csv is not shipped: .gitignore, .rayignore or --exclude names it, "
        "got 'rows/train.csv'"
    ]


def test_what_an_option_leaves_out_is_refused_too(folder):
    (found,) = problems(folder, excludes=["train.csv"])
    assert found.startswith("data.train: rows/train.csv is not shipped")


@pytest.mark.parametrize("pattern", ["*.safetensors", "bert", "bert/config.json", "/bert/*"])
def test_a_model_that_is_ignored_or_a_part_of_it_is_refused(folder, pattern):
    write(folder, {".gitignore": pattern})
    (found,) = problems(folder)
    assert found.startswith("model.path: bert")
    assert found.endswith("--exclude names it, got 'bert'")


def test_a_teacher_and_every_part_of_the_data_are_looked_for(folder):
    write(folder, {"good.csv": "x", "ignored.csv": "x", ".gitignore": "ignored.csv\nteacher"})
    write(folder, {"teacher/config.json": "x", "ignored.py": "x"})
    write(folder, {"rows/.gitignore": "!train.csv"})
    parts = [
        {"source": "files", "train": "good.csv", "validation": "ignored.csv"},
        {"source": "files", "train": ["good.csv", "ignored.csv"]},
        {"source": "function", "function": "ignored:load"},
        {"source": "function", "function": "json:load"},
        {"source": "hub", "path": "nyu-mll/glue"},
    ]
    write(
        folder, {"rows.yaml": yaml.safe_dump({**RUN, "data": {"source": "joined", "parts": parts}})}
    )
    given = {"config": "rows.yaml", "excludes": ["*.py"]}
    found = problems(folder, "distill={teacher: teacher}", allow_code=True, **given)
    assert [problem.partition(": ")[0] for problem in found] == [
        "distill.teacher",
        "data.parts.0.validation",
        "data.parts.1.train",
        "data.parts.2.function",
    ]


def test_what_lies_elsewhere_is_refused_unless_all_nodes_have_it(folder, tmp_path):
    write(tmp_path, {"near.csv": "x", "far/bert/config.json": "x"})
    near, far = tmp_path / "near.csv", tmp_path / "far" / "bert"
    assert problems(folder, "data.train=../near.csv") == [
        "data.train: is not in FOLDER, the folder that is shipped, got '../near.csv'"
    ]
    found = problems(folder, f"data.train={near}", f"model.path={far}")
    copy = "is not in the copy of FOLDER that a job has"
    shared = "name a folder that all nodes have by --shared FOLDER"
    assert found == [
        f"model.path: {copy}, got '{far}'; {shared}",
        f"data.train: {copy}, got '{near}'; {shared}",
    ]
    (found,) = problems(folder, f"data.train={near}", f"model.path={far}", shared=[str(far.parent)])
    assert found.startswith("data.train: ")
    inside = folder / "rows" / "train.csv"
    (found,) = problems(folder, f"data.train={inside}")
    assert found.endswith("; write rows/train.csv, or " + shared)
    make_submission(
        str(folder / "run.yaml"),
        [f"data.train={near}", f"model.path={far}"],
        working_dir=str(folder),
        shared=[str(tmp_path)],
    )


def test_paths_are_those_of_the_copy_wherever_the_command_is_given(folder, tmp_path, monkeypatch):
    write(tmp_path, {"here.csv": "x"})
    monkeypatch.chdir(tmp_path)
    (found,) = problems(folder, "data.train=here.csv")
    assert found == (
        "data.train: is not there in FOLDER, the folder that is shipped, got 'here.csv'"
    )


def test_names_on_the_hub_and_of_packages_are_left_alone(folder):
    overrides = ["model.path=google-bert/bert-base-uncased", "data.train=package:nowhere/rows.csv"]
    make_submission(str(folder / "run.yaml"), overrides, working_dir=str(folder))


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"run.yaml": "extends: base/run.yaml\n", ".gitignore": "base\n"},
            "base/run.yaml: base/run.yaml is not shipped: .gitignore, .rayignore or --exclude names "
            "it, got 'base/run.yaml'",
        ),
        (
            {"run.yaml": "extends: ../base/run.yaml\n"},
            "../base/run.yaml: is not in FOLDER, the folder that is shipped, got '../base/run.yaml'",
        ),
        (
            {".gitignore": "run.yaml\n"},
            "run.yaml: run.yaml is not shipped: .gitignore, .rayignore or --exclude names it, got "
            "'run.yaml'",
        ),
        (
            {
                "run.yaml": yaml.safe_dump({**RUN, "model": {"path": "run:dense.yaml train.lr=1"}}),
                ".gitignore": "dense.yaml\n",
                "dense.yaml": "",
            },
            "model.path: dense.yaml is not shipped: .gitignore, .rayignore or --exclude names it, got "
            "'dense.yaml'",
        ),
    ],
)
def test_configuration_files_are_shipped_too(folder, files, line):
    for place in (folder / "base", folder.parent / "base"):
        write(place, {"run.yaml": yaml.safe_dump(RUN)})
    write(folder, files)
    assert problems(folder) == [line]


def test_the_runs_of_a_campaign_name_files_too(folder):
    campaign = {
        "name": "all",
        "recipe": "run.yaml",
        "storage": "/shared/runs",
        "methods": {"mgpp": {}},
        "sparsities": [0.5],
        "tasks": {"a": {}, "b": {"changes": {"data.train": "rows/dev.csv"}}},
    }
    write(folder, {"all.yaml": yaml.safe_dump(campaign), ".gitignore": "dev.csv"})
    (found,) = problems(folder, config="all.yaml", command="campaign")
    assert found.startswith("data.train: rows/dev.csv is not shipped")


def test_what_is_left_out_is_what_ray_leaves_out(folder, tmp_path, monkeypatch):
    write(
        folder,
        {
            ".gitignore": "# what git ignores\n*.log\n/build/\ndata/**/raw\n!keep.log\n",
            ".rayignore": "big.bin\n",
            "keep.log": "x",
            "deep/a.log": "x",
            "deep/keep.log": "x",
            "deep/.gitignore": "*.tmp\n!a.log\n",
            "deep/a.tmp": "x",
            "deep/er/b.tmp": "x",
            "build/a": "x",
            "deep/build/a": "x",
            "data/one/raw/a": "x",
            "data/one/kept/a": "x",
            "big.bin": "x",
            "venv/a": "x",
            "deep/__pycache__/a.pyc": "x",
            "own/a": "x",
        },
    )
    excludes = [*EXCLUDES, "own/", "venv"]
    for by_git in ("0", "1"):
        monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", by_git)
        kept, packed = kept_and_packed(folder, excludes, tmp_path)
        assert kept == packed
        assert 5 < len(kept) < sum(path.is_file() for path in folder.rglob("*"))
    monkeypatch.delenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE")
    write(folder, {".gitignore": "*\n!run.yaml\n"})  # the folder itself is what * names
    assert kept_and_packed(folder, excludes, tmp_path) == (set(), set())


def kept_and_packed(folder, excludes, tmp_path):
    """The files of a folder that are taken to be shipped, and those that Ray packs."""
    package = tmp_path / "package.zip"
    by_git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    create_package(str(folder), package, include_gitignore=by_git, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    package.unlink()
    shipment = Shipment(folder, excludes)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)) for p in files if not shipment.leaves_out(p)}, packed


# The variable of a dashboard.


@pytest.mark.parametrize(
    "command", [["run", "run.yaml"], ["validate", "run.yaml"], ["cluster", "wait"]]
)
def test_a_dashboard_is_no_cluster_to_join(folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, command, env={"RAY_ADDRESS": "http://head:8265"})
    assert done.exit_code == 2
    assert done.stderr == (
        "error: RAY_ADDRESS: is a dashboard's address, got 'http://head:8265'; allowed are auto, "
        "HOST:6379, ray://HOST:10001; a dashboard takes jobs: `mgpp submit` with "
        "RAY_API_SERVER_ADDRESS or --address\n"
    )
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("address", ["http://head:8265", "https://head"])
def test_a_dashboard_in_the_configuration_is_refused_too(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConfigError, match=r"^cluster\.address: is a dashboard's address"):
        address_of(ClusterConfig(address=address))
    assert address_of(ClusterConfig(address="ray://head:10001")) == "ray://head:10001"
    assert address_of(ClusterConfig()) == "auto"


def test_the_address_that_is_given_counts_more_than_a_variable(monkeypatch):
    asked = []
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", asked.append)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://another:8265")
    connect("http://head:8265")
    assert asked == ["http://head:8265"]
    assert get_address_for_submission_client(asked[0]) == "http://head:8265"
