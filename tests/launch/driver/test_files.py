"""What a run leaves, and what it takes no notice of: modes, secrets, names in the working folder."""

import os
import stat
from pathlib import Path

import pytest

from tests.launch.conftest import SECRETS, TAKEN_NAMES, UMASK, mgpp
from tests.processes import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def test_modules_of_the_working_folder_are_not_taken_for_ours(first_run):
    for name in TAKEN_NAMES:
        assert f"this is no {name}" not in first_run.stderr


def test_no_secret_of_the_environment_is_written_anywhere(project, first_run, ray_folder):
    said = first_run.stdout + first_run.stderr
    places = (project, ray_folder, Path(os.environ["MGPP_CACHE"]))
    found = [path for place in places for path in place.rglob("*") if path.is_file()]
    written = {path: path.read_bytes() for path in found}
    for pattern in ("report.html", "README.md", "_DONE.json", "metrics.jsonl", "*.log", "raylet.*"):
        assert any(path.match(pattern) and content for path, content in written.items()), pattern
    for secret in SECRETS.values():
        assert secret not in said
        assert [path for path, content in written.items() if secret.encode() in content] == []


def test_every_file_of_a_run_is_the_group_s_to_read(project, first_run):
    found = {}
    for path in (Path(project / "runs"), *Path(project / "runs").rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~UMASK
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != expected:
            found[str(path.relative_to(project))] = oct(mode)
    assert found == {}


@pytest.mark.torture
def test_a_function_of_the_working_folder_gives_rows_on_a_cluster_that_is_joined(
    project, cluster, tmp_path
):
    cluster.add_node(num_cpus=2)
    for name in TAKEN_NAMES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('this is no {name} of mgpp')\n")
    (tmp_path / "mine.py").write_text(
        "from datasets import load_dataset\n\n"
        "def load(rows):\n"
        "    return load_dataset('csv', data_files={'train': rows}, delimiter='\\t')\n"
    )
    data = f"{{source: function, function: 'mine:load', arguments: {{rows: {project}/rows.tsv}}}}"
    given = [f"data={data}", "dense.enabled=false", "cluster.gpus_per_worker=0"]
    where = [f"storage={tmp_path / 'runs'}", f"cluster.address={cluster.address}"]
    command = ["run", str(project / "run.yaml"), *given, *where]
    settings = {"env": {"PYTHONPATH": str(ROOT)}, "cwd": tmp_path}
    refused = mgpp(project, *command, **settings)
    assert refused.returncode == 2
    assert "data.function: a function from outside of mgpp is not run" in refused.stderr
    done = mgpp(project, *command, "--allow-code", **settings)
    assert done.returncode == 0, done.stderr[-6000:]
    assert list((tmp_path / "runs").glob("report-*/a-*/report.html"))
