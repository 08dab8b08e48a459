"""What a run leaves, and what it takes no notice of: modes, secrets, names in the working folder."""

import stat
from pathlib import Path

import pytest

from tests.launch.conftest import SECRETS, TAKEN_NAMES, UMASK

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def test_modules_of_the_working_folder_are_not_taken_for_ours(first_run):
    for name in TAKEN_NAMES:
        assert f"this is no {name}" not in first_run.stderr


def test_no_secret_of_the_environment_is_written_anywhere(project, first_run):
    said = first_run.stdout + first_run.stderr
    written = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert len([path for path in written if path.suffix in (".html", ".md", ".log", ".jsonl")]) >= 5
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
