"""Values that mean something to YAML, a shell or sbatch: refused by name, or in the files as they are."""

import shlex
import subprocess
from typing import get_args

import pytest
import yaml
from omegaconf import OmegaConf

from launch.cluster import render
from launch.cluster.description import ClusterDescription, describe_cluster
from launch.cluster.render import render_cluster
from launch.cluster.submission import make_submission
from pipeline.errors import ConfigError

HOSTILE = [
    "a\nb", "a\n#SBATCH --uid=0\nb", "a\r\nb", "a\tb", "a\x00b", "a\x1b[2Jb", "a\x7fb", "a\x85b",
    "a\u2028b", "a\u2029b", "\ufeffa", "a\ufeffb", "a\uffffb", "a\ud800b", "a'b", 'a"b', "a\\", "a\\nb",
    "$(touch a)", "`touch a`", "$HOME", "${HOME}", "~", "a;b", "a&&b", "a|b", "a>b", "a<<b", "a #b", "#a",
    "a: b", "a:", "- a", "-a", "--a=b", "?", "? a", "&a", "*a", "!a", "!!int 1", "%a", "@a", "|", ">",
    "{{ a }}", "{% a %}", "{# a #}", "{a: b}", "[a]", "a, b", "null", "true", "1", "0x1", "1e3", "1:30",
    "2024-01-01", "", " ", " a", "a ", "a b", "a\xa0b", "a\u200bb", "a\u202eb", "é", "日本",
    "😀", "a" * 5000,
]  # fmt: skip
MARK = "mgppmark"
LOCAL = {"provider": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
AWS = {"instance_type": "p5.48xlarge"}
# What a value can be given for, by target: the description to which it is added, and its keys.
GIVEN = {
    "slurm": [({}, ["name", "partition", "time_limit", "setup"])],
    "kuberay": [({"image": "mgpp:1"}, ["name", "image", "claim"])],
    "skypilot": [({"gpu_type": "H100"}, ["name", "image", "gpu_type", "install"])],
    "ray-up": [
        (AWS, ["name", "image", "region", "instance_type", "ssh_user", "install", "setup"]),
        (LOCAL, ["head_ip", "worker_ips"]),
    ],
}
CASES = [
    (target, base, key) for target, forms in GIVEN.items() for base, keys in forms for key in keys
]
IDS = [f"{target}-{key}" for target, _, key in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, project):
    """A folder with the configuration of a run whose storage is on all nodes."""
    values = yaml.safe_load((project / "run.yaml").read_text())
    values |= {"storage": "/mnt/runs", "cluster": {"num_workers": 2, "gpus_per_worker": 1}}
    made = tmp_path_factory.mktemp("rendered")
    (made / "run.yaml").write_text(yaml.safe_dump(values))
    return made


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def files_of(target, values, config="run.yaml", overrides=()):
    sizes = {"name": "a", "nodes": 2, "gpus_per_node": 1, "cpus_per_node": 8, "memory_gib": 64}
    return render_cluster(target, describe_cluster(sizes | values, []), config, overrides)


def given(key, value):
    return {key: [value] if key == "worker_ips" else value}


def parsed(target, files):
    """What each file holds; of a script its lines, which all have a meaning to sbatch or bash."""
    if target == "slurm":
        return [text.split("\n") for text in files.values()]
    return [list(yaml.safe_load_all(text)) for text in files.values()]


def with_value(tree, value):
    """The same with a value in place of the mark."""
    if isinstance(tree, dict):
        return {with_value(k, value): with_value(v, value) for k, v in tree.items()}
    if isinstance(tree, list):
        return [with_value(inner, value) for inner in tree]
    return tree.replace(MARK, value) if isinstance(tree, str) else tree


def test_every_text_of_a_description_is_given_a_hostile_value():
    texts = {
        key
        for key, field in ClusterDescription.model_fields.items()
        if str in (field.annotation, *get_args(field.annotation)) or field.annotation == list[str]
        or "str" in str(field.annotation)
    }  # fmt: skip
    assert texts == {key for _, _, key in CASES}


@pytest.mark.parametrize(("target", "base", "key"), CASES, ids=IDS)
def test_a_value_is_refused_by_name_or_stands_there_as_it_is(target, base, key):
    plain = "12:00:00" if key == "time_limit" else MARK
    as_marked = parsed(target, files_of(target, base | given(key, plain)))
    if key == "name":  # comments name the file
        as_marked = parsed(target, files_of(target, base | {"name": MARK}))
    accepted = []
    for value in HOSTILE:
        try:
            files = files_of(target, base | given(key, value))
        except ConfigError as error:
            (problem,) = error.problems
            assert key in problem.key, problem
            assert str(problem).isprintable()
            continue
        accepted.append(value)
        if key == "time_limit":
            wanted = [[line.replace(plain, value) for line in lines] for lines in as_marked]
        elif target == "slurm":
            wanted = [with_value("\n".join(lines), value).split("\n") for lines in as_marked]
        else:
            wanted = with_value(as_marked, value)
        assert parsed(target, files) == wanted, value
        assert all(text.encode().decode() == text for text in files.values())
    # Only what is a script may have anything but a few ASCII characters in it.
    if key in ("setup", "install"):
        assert {"a\nb", "a: b", "{{ a }}", "日本", "a #b", "$(touch a)"} <= set(accepted)
        assert not {"a\u2028b", "a\x85b", "a\x00b", "a'b", "a\\", "a<<b"} & set(accepted)
    else:
        allowed = set("abcdefghijklmnopqrstuvwxyz0123456789:/.-_@+,")
        assert set("".join(accepted)) <= allowed, accepted
        assert not any(value.startswith("-") for value in accepted if key != "time_limit")


def test_scripts_stay_whole_with_any_setup():
    for value in HOSTILE:
        try:
            files = files_of("slurm", {"setup": value})
        except ConfigError:
            continue
        for text in files.values():
            done = subprocess.run(
                ["bash", "-n"], input=text, capture_output=True, text=True, timeout=30, check=False
            )
            assert (done.returncode, done.stderr) == (0, ""), value


def words_of(target, config, overrides):
    """The line of each file that runs mgpp; None where a word is refused by name."""
    needed = {"skypilot": {"gpu_type": "H100"}}.get(target, {})
    try:
        files = files_of(target, needed, config, overrides)
    except ConfigError as error:
        refused = error.problems
        files = {}
    if not files:
        assert all(str(problem).isprintable() for problem in refused)
        assert {problem.key for problem in refused} <= {"CONFIG", "storage"}
        return None
    if target == "skypilot":
        (text,) = files.values()
        return [yaml.safe_load(text)["run"].splitlines()[-1]]
    texts = [text.replace("\\\n", "") for text in files.values()]
    return [next(line for line in text.splitlines() if "mgpp run " in line) for text in texts]


@pytest.mark.parametrize("target", ["slurm", "skypilot"])
def test_a_path_and_overrides_reach_mgpp_as_they_are_given(target, folder):
    """Bash reads all the lines, with a function in place of mgpp that prints its arguments."""
    lines, wanted = ["mgpp() { printf '%s\\0' \"$@\" END; }"], []
    for value in HOSTILE:
        path = f"of {value}.yaml"
        try:
            (folder / path).write_text((folder / "run.yaml").read_text())
        except (OSError, ValueError):
            path = "run.yaml"  # no file has such a name
        override = f"storage=/mnt/{value}"
        found = words_of(target, path, [override])
        if found is None:
            continue
        for line in found:
            lines.append(line[line.index("mgpp run ") :].removesuffix("&"))
            joined = ["cluster.address=auto"] if "cluster.address=auto" in line else []
            wanted.append(["run", path, override, *joined])
    done = subprocess.run(
        ["bash"], input="\n".join(lines), capture_output=True, text=True, timeout=60, check=True
    )
    seen = [words.split("\0")[:-1] for words in done.stdout.split("END\0")[:-1]]
    assert seen == wanted
    assert len(wanted) > 30
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("of ")) == [
        "run.yaml"
    ]


@pytest.mark.parametrize("value", ["a\nb", "a\u2028b", "a\x85b", "a\x00b", "a\ud800b"])
def test_what_no_line_can_hold_is_refused_where_it_is_given(value, folder):
    for target, overrides, key in (
        ("slurm", [f"model.path={value}"], "model.path"),
        ("kuberay", [f"storage=/mnt/{value}"], "storage"),
    ):
        with pytest.raises(ConfigError) as caught:
            files_of(target, {"image": "mgpp:1"}, "run.yaml", overrides)
        (problem,) = caught.value.problems
        assert str(problem).startswith(f"{key}: must be one line without control characters")
    with pytest.raises(ConfigError, match="CONFIG: must be one line"):
        files_of("slurm", {}, f"{value}.yaml")


def test_a_path_that_looks_like_an_option_is_a_path(folder):
    (folder / "--json.yaml").write_text((folder / "run.yaml").read_text())
    for text in files_of("slurm", {}, "--json.yaml").values():
        assert " ./--json.yaml " in text


@pytest.mark.parametrize("values", [HOSTILE, [v for v in HOSTILE if v.isprintable()]])
def test_kubernetes_mounts_every_text_of_a_configuration_as_it_is(folder, values):
    texts = [value for value in values if "$" not in value and "\ud800" not in value]
    run = yaml.safe_load((folder / "run.yaml").read_text())
    upstream = run | {"task": run["task"] | {"text": texts}}
    # Nothing of the name is for a ConfigMap's key. Without a style the text 1e3 would have no quotes.
    (folder / "日本").write_text(yaml.safe_dump(upstream, default_style='"'))
    (folder / "down.yaml").write_text(yaml.safe_dump(run | {"model": {"path": "run:日本"}}))
    for text in files_of("kuberay", {"image": "m:1"}, "down.yaml").values():
        data = next(yaml.safe_load_all(text))["data"]
        assert set(data) == {"run.yaml", "file"}
        assert yaml.safe_load(data["run.yaml"])["model"] == {"path": "run:/etc/mgpp/file"}
        assert OmegaConf.to_container(OmegaConf.create(data["file"])) == upstream


# Values that got past all checks are seen in what they do to a file.

INJECTED = [
    ("slurm", "partition", "gpu\nrm -rf /"),
    ("slurm", "partition", "gpu --uid=0"),
    ("slurm", "partition", "gpu # all"),
    ("slurm", "time_limit", "1\n#SBATCH --uid=0"),
    ("slurm", "name", "a --wrap=b"),
    ("kuberay", "image", "a\n        securityContext: {privileged: true}"),
    ("kuberay", "claim", "a}, hostPath: {path: /"),
    ("kuberay", "name", "a, namespace: kube-system"),
    ("ray-up", "image", "a # b"),
    ("ray-up", "ssh_user", "a\n  ssh_private_key: b"),
    ("ray-up", "region", "[a"),
    ("skypilot", "image", "a: b"),
    ("skypilot", "gpu_type", "H100\nenvs: {A: b}"),
    ("skypilot", "name", "*a"),
]


@pytest.mark.parametrize(("target", "key", "value"), INJECTED)
def test_a_value_that_changes_its_file_is_found_when_it_is_read_back(
    target, key, value, monkeypatch
):
    monkeypatch.setattr(render, "_as_yaml", str)  # nothing is quoted
    base, _ = GIVEN[target][0]
    sizes = {"name": "a", "nodes": 2, "gpus_per_node": 1, "cpus_per_node": 8, "memory_gib": 64}
    description = describe_cluster(sizes | base, []).model_copy(update={key: value})
    overrides = ["storage=/mnt/runs"]
    with pytest.raises(ConfigError) as caught:
        render_cluster(target, description, "run.yaml", overrides)
    assert any(
        problem.key == key or "cannot be read" in problem.why for problem in caught.value.problems
    ), caught.value.problems


def test_the_command_of_a_job_is_read_as_it_was_meant(folder):
    accepted = []
    for value in [value for value in HOSTILE if set(value) & set("'\"$`;&|# \n")]:
        override = f"task.label={value}"
        try:
            job = make_submission("run.yaml", [override, "storage=/mnt/runs"], shared=["/"])
        except ConfigError:
            continue
        accepted.append(value)
        words = ["mgpp", "run", "run.yaml", override, "storage=/mnt/runs"]
        assert shlex.split(job.entrypoint) == words
    assert {"a'b", "$(touch a)", "a;b", "a #b", "a b"} <= set(accepted)
