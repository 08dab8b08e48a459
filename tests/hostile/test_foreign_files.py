"""Files of others that a configuration names: none is waited for, and no error prints what one holds."""

import os

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.main import app
from tests.hostile import configuration

SECRET = "hunter2"
LAUGHS = "\n".join(
    ["a0: &a0 [hunter2]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}*a{i - 1}]" for i in range(1, 9))]
)
FILES = {
    "passwd": f"root:x:0:0:{SECRET}:/root:/bin/bash\nnobody:x:1:1:{SECRET}:/:/bin/false\n",
    "shadow": f"root:$6${SECRET}$.:19000:0:99999:7:::\n",
    "shell.env": f"HF_TOKEN={SECRET}\nAWS_SECRET_ACCESS_KEY='{SECRET}'\n",
    "key.pem": f"-----BEGIN PRIVATE KEY-----\n{SECRET}==\n-----END PRIVATE KEY-----\n",
    "kube.yaml": f"apiVersion: v1\nkind: Secret\ndata: {{token: {SECRET}}}\n",
    "secret.json": f'{{"{SECRET}": {{"client_secret": "{SECRET}"}}}}',
    "netrc": f"machine hub login me password {SECRET}\n",
    "table.csv": f"user,password\nme,{SECRET}: 'x\n",
    "list.yaml": f"- {SECRET}\n",
    "alias.yaml": f"name: *{SECRET}\n",
    "anchor.yaml": f"name: &{SECRET} a\nmodel: &{SECRET} [\n",
    "tag.yaml": f"name: !{SECRET} a\n",
    "handle.yaml": f"name: !{SECRET}!a b\n",
    "key-twice.yaml": f"{SECRET}: 1\n{SECRET}: 2\n",
    "key-open.yaml": f"name: a\n{SECRET}\nmodel: b\n",
    "quote-open.yaml": f'name: "{SECRET}\n',
    "reference.yaml": f"name: ${{{SECRET}\n",
    "resolver.yaml": "name: ${oc.env:HF_TOKEN}\n",
    "base-60.yaml": f"name: 1:30 # {SECRET}\n",
    "laughs.yaml": LAUGHS,
    "references.yaml": "\n".join(["name: ${r0}", *(f"r{i}: ${{r{i + 1}}}${{r{i + 1}}}" for i in range(40)), f"r40: {SECRET}"]),
    "image.png": b"\x89PNG\r\n\x1a\n\x00" + SECRET.encode(),
    "latin-1.txt": f"na\xefve: {SECRET}".encode("latin-1"),
    "huge.yaml": f"{SECRET}: 1\n" + "# padding\n" * 200_000,
}  # fmt: skip


def folder_of_others(folder):
    """Write files that are no configurations; return the name of each."""
    for name, content in FILES.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    (folder / "link.yaml").symlink_to(folder / "passwd")
    (folder / "circle.yaml").symlink_to(folder / "circle.yaml")
    (folder / "folder.yaml").mkdir()
    os.mkfifo(folder / "pipe.yaml")
    os.truncate(folder / "huge.yaml", 1 << 34)  # takes no room
    more = ["link.yaml", "circle.yaml", "folder.yaml", "pipe.yaml", "/dev/zero", "/dev/tty"]
    return [*FILES, *more, "/proc/self/environ", "/proc/kmsg", "/etc/passwd", "/etc/shadow", ""]


def routes(name):
    """Return the ways by which a file is named: files to write, and the command that is given."""
    base = yaml.safe_load(configuration.BASE)
    campaign = {"name": "c", "recipe": name, "methods": {"m": {}}, "sparsities": [0.5]}
    tasks = {**campaign, "recipe": None, "tasks": {"t": {"recipe": name}}}
    return {
        "the file itself": ({}, f"validate {name}"),
        "extends": ({"run.yaml": {**base, "extends": name}}, "validate run.yaml"),
        "run": ({"run.yaml": {**base, "model": {"path": f"run:{name}"}}}, "plan run.yaml"),
        "recipe": ({"c.yaml": campaign}, "campaign status c.yaml"),
        "recipe of a task": ({"c.yaml": tasks}, "campaign c.yaml"),
        "a job's": ({"run.yaml": {**base, "extends": name}}, "submit run.yaml"),
        "a cluster's": (
            {"c.yaml": campaign},
            "cluster render slurm c.yaml --campaign storage=/mnt",
        ),
    }


@pytest.mark.parametrize("route", list(routes("")))
def test_no_error_prints_a_line_of_a_file_that_is_no_configuration(route, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in folder_of_others(tmp_path):
        files, command = routes(name)[route]
        if not name and route == "the file itself":
            continue  # then the command lacks an argument
        for file, values in files.items():
            (tmp_path / file).write_text(yaml.safe_dump(values))
        done = CliRunner().invoke(app, command.split())
        said = done.stdout + done.stderr
        assert done.exit_code == 2, (name, said)
        assert said.startswith("error: "), (name, said)
        assert SECRET not in said, (name, said)
        assert "root:" not in said, (name, said)


def test_where_a_file_is_wrong_is_said_by_line_and_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of_others(tmp_path)
    for name, place in {
        "quote-open.yaml": "line 2, column 1: not valid YAML",
        "alias.yaml": "line 1, column 7: not valid YAML: found undefined alias",
        "tag.yaml": "line 1, column 7: this tag is not allowed",
        "passwd": "line 1, column 1: must be a mapping of sections, got text",
        "latin-1.txt": "it is no text in UTF-8, from byte 2 on",
        "huge.yaml": "it has more than 1048576 bytes",
    }.items():
        (tmp_path / "run.yaml").write_text(f"extends: {name}\n")
        done = CliRunner().invoke(app, ["validate", "run.yaml"])
        assert done.stderr.startswith(f"error: {name}: no configuration of mgpp: {place}"), name
