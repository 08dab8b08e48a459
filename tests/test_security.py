"""Each sentence of SECURITY.md has a test that would fail if it were not so."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel
from typer.testing import CliRunner

import mgpp
from launch.cli.main import app
from launch.cluster.connect import passed_on
from launch.cluster.submission import make_submission
from pipeline.storage.node_copies import DamagedArtifactError
from pipeline.store.artifacts import ArtifactStore
from tests.hostile.folders import Code, as_pickle
from tests.launch.cluster.test_shipping import RUN
from tests.launch.conftest import SECRETS
from tests.processes import ROOT, free_port, run

CODE = "tests/pipeline/runs/test_foreign_code.py"
VALUES = "tests/launch/cluster/test_rendered_values.py"
RENDER = "tests/launch/cluster/test_render.py"
FILES = "tests/launch/driver/test_files.py"
SHIPPING = "tests/launch/cluster/test_shipping.py"
JOBS = "tests/launch/cluster/test_jobs.py"
HERE = "tests/test_security.py"
# By how a sentence begins: the tests of it.
TESTS = {
    "mgpp is for people who may run code": [f"{CODE}::test_with_permission_it_is_run"],
    "It does not shut in the code": [f"{CODE}::test_with_permission_it_is_run"],
    "Whoever gives a command is trusted": [
        f"{VALUES}::test_a_value_is_refused_by_name_or_stands_there_as_it_is"
    ],
    "--allow-code lets a configuration": [
        f"{CODE}::test_with_permission_it_is_run",
        f"{CODE}::test_code_that_comes_with_a_model_is_not_run_either",
    ],
    "Whoever may write to the store": [f"{HERE}::test_checksums_find_damage_and_no_forger"],
    "A configuration is not: without": [
        f"{CODE}::test_validate_runs_nothing_that_a_configuration_names",
        f"{CODE}::test_every_command_that_would_run_it_says_what_to_do",
    ],
    "A configuration cannot give": [f"{CODE}::test_a_configuration_cannot_give_the_permission"],
    "A configuration refers to its own": [
        "tests/hostile/test_foreign_files.py::test_no_error_prints_a_line_of_a_file_that_is_no_configuration",
        "tests/hostile/test_hostile.py::test_it_is_refused_in_one_line",
    ],
    "An error about a file": [
        "tests/hostile/test_foreign_files.py::test_no_error_prints_a_line_of_a_file_that_is_no_configuration"
    ],
    "A model's files are not": [
        "tests/hostile/test_models.py::test_a_folder_that_must_not_be_trained",
        f"{HERE}::test_a_pickle_that_runs_code_is_not_loaded",
    ],
    "Outside of a submitted job a module": [
        f"{FILES}::test_modules_of_the_working_folder_are_not_taken_for_ours"
    ],
    "mgpp submit refuses to ship": [
        f"{SHIPPING}::test_a_module_that_a_job_would_take_for_mgpp_s_is_refused"
    ],
    "A value that a configuration or an option": [
        f"{VALUES}::test_a_value_is_refused_by_name_or_stands_there_as_it_is",
        f"{VALUES}::test_a_path_and_overrides_reach_mgpp_as_they_are_given",
        f"{VALUES}::test_kubernetes_mounts_every_text_of_a_configuration_as_it_is",
    ],
    "Each rendered file is read back": [
        f"{VALUES}::test_a_value_that_changes_its_file_is_found_when_it_is_read_back"
    ],
    "No secret of the environment": [
        f"{FILES}::test_no_secret_of_the_environment_is_written_anywhere"
    ],
    "No rendered file has one either": [f"{RENDER}::test_no_rendered_file_holds_a_secret"],
    "A configuration that holds the hub's": [
        f"{RENDER}::test_a_configuration_with_the_token_in_it_is_refused"
    ],
    "mgpp submit gives a job no variable": [f"{HERE}::test_a_job_gets_no_secret"],
    "Files of a run can be read": [f"{FILES}::test_every_file_of_a_run_is_the_group_s_to_read"],
    "What --allow-code allows runs": [
        f"{CODE}::test_with_permission_it_is_run",
        f"{FILES}::test_a_function_of_the_working_folder_gives_rows_on_a_cluster_that_is_joined",
    ],
    "mgpp run without a cluster's": [f"{HERE}::test_a_ray_of_its_own_asks_for_a_token"],
    "A cluster that is joined runs": [
        f"{JOBS}::test_a_job_runs_to_its_end_and_is_listed",
        f"{FILES}::test_a_function_of_the_working_folder_gives_rows_on_a_cluster_that_is_joined",
    ],
    "Every cluster that mgpp cluster render": [f"{RENDER}::test_every_cluster_asks_for_a_token"],
    "Its dashboard listens on loopback": [f"{RENDER}::test_the_dashboard_is_on_loopback"],
    "A command shows the token": [f"{JOBS}::test_a_cluster_that_asks_for_a_token"],
    "Neither Ray's connections nor": [
        f"{RENDER}::test_every_cluster_asks_for_a_token",
        f"{HERE}::test_collectives_take_whoever_comes",
    ],
    "Collectives ask for no token": [f"{HERE}::test_collectives_take_whoever_comes"],
    "Do not open an issue": [f"{HERE}::test_who_reports_a_bug_is_sent_here"],
    "mgpp --version prints": [f"{HERE}::test_the_version_is_printed"],
}


def sentences() -> list[str]:
    """Return the sentences of SECURITY.md, without marks of code."""
    text = re.sub(r"^#.*$", "", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    blocks = re.split(r"\n\n|^- ", text, flags=re.MULTILINE)
    plain = [" ".join(block.replace("`", "").split()) for block in blocks]
    return [s for block in plain for s in re.split(r"(?<=\.) ", block) if s]


def test_each_sentence_has_its_tests():
    found = sentences()
    assert len(found) > 25
    for sentence in found:
        assert sum(sentence.startswith(begin) for begin in TESTS) == 1, sentence
    for begin in TESTS:
        assert any(sentence.startswith(begin) for sentence in found), begin


@pytest.mark.parametrize("test", sorted({test for tests in TESTS.values() for test in tests}))
def test_the_tests_are_there(test):
    file, name = test.split("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_people_find_it():
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "(SECURITY.md)" in (ROOT / page).read_text()


def test_checksums_find_damage_and_no_forger(tmp_path):
    def commit(content):
        attempt = ArtifactStore(str(tmp_path)).begin("train", "0123abcd", params={}, inputs={})
        (attempt.folder / "weights").write_text(content)
        return attempt.commit({}, 1.0)

    artifact = commit("right")
    (artifact.path / "weights").write_text("wrong")
    with pytest.raises(DamagedArtifactError, match="weights has another checksum"):
        _ = artifact.path
    forged = commit("wrong")  # and with it the manifest
    assert (forged.path / "weights").read_text() == "wrong"


def test_a_pickle_that_runs_code_is_not_loaded(tiny_bert, tmp_path, capsys):
    """By transformers, which loads what mgpp has checked."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    as_pickle({"embeddings.LayerNorm.bias": Code()})(folder)
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported|Unpickling"):
        AutoModel.from_pretrained(folder)
    assert "run" not in capsys.readouterr().out.split()


def test_a_job_gets_no_secret(tmp_path, monkeypatch):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_HOME", "/models")
    assert passed_on() == {"HF_HOME": "/models"} | {
        name: os.environ[name] for name in ("HF_HUB_OFFLINE", "MGPP_CACHE") if name in os.environ
    }
    changes = {"model": {"path": "org/model"}, "data": {"source": "files", "train": "rows.csv"}}
    run = RUN | changes
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "rows.csv").write_text("text,label")
    made = make_submission(str(tmp_path / "run.yaml"), [], working_dir=str(tmp_path))
    assert "/models" in repr(made)
    assert not any(secret in repr(made) for secret in SECRETS.values())


CONNECT = """
import ray, sys
from launch.cluster.connect import connected
from pipeline.runs.config import ClusterConfig
with connected(ClusterConfig()):
    dashboard = ray._private.worker._global_node.webui_url
    print(ray.get_runtime_context().gcs_address, repr(dashboard), flush=True)
    sys.stdin.readline()
"""
ASK = """
import sys
from ray._raylet import GcsClient
print("nodes:", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
"""


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_ray_of_its_own_asks_for_a_token(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
    } | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", CONNECT],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            address, dashboard = process.stdout.readline().split()
            assert dashboard in ("''", "None")
            token = (tmp_path / ".ray" / "auth_token").read_text()  # it has one, and is let in
            settings = {"RAY_AUTH_MODE": "disabled"}
            done = run([sys.executable, "-c", ASK, address], timeout=120, env=settings)
            assert "nodes" not in done.stdout
            assert "nauthenticated" in done.stderr, done.stderr[-3000:]
            assert token not in done.stdout + done.stderr
        finally:
            process.communicate("\n", timeout=60)


def test_collectives_take_whoever_comes():
    """A second process needs the address alone, and what it reads was sent as it is."""
    port = free_port()
    of_workers = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False
    )
    of_workers.set("weights", "0.5")
    of_another = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    assert of_another.get("weights") == b"0.5"


def test_who_reports_a_bug_is_sent_here():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    first = form["body"][0]
    assert first["type"] == "markdown"
    assert "SECURITY.md" in first["attributes"]["value"]


def test_the_version_is_printed():
    printed = CliRunner().invoke(app, ["--version"])
    assert printed.stdout == f"mgpp {mgpp.__version__}\n"
