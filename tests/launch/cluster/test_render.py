"""Files that start clusters: each valid for what reads it, the SLURM scripts run on this machine."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from transformers import LlamaConfig

from launch.cluster import mounted
from launch.cluster.description import describe_cluster
from launch.cluster.render import render_cluster
from pipeline.campaigns.grid import campaign_runs, read_campaign
from pipeline.errors import ConfigError
from pipeline.runs.config import parse_config, read_config
from tests.launch.conftest import SECRETS
from tests.launch.slurm import render_for_two_nodes, run_script, write_stand_ins
from tests.processes import ROOT, free_port

GPUS = {
    "name": "llama",
    "nodes": 4,
    "gpus_per_node": 8,
    "cpus_per_node": 96,
    "memory_gib": 1000,
    "image": "registry/mgpp:1",
}


@pytest.fixture
def config(project, tmp_path):
    values = yaml.safe_load((project / "run.yaml").read_text())
    values["storage"] = "s3://bucket/runs"
    values["cluster"] = {"num_workers": 32, "gpus_per_worker": 1}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def rendered(target, config, *settings, overrides=(), **values):
    description = describe_cluster({**GPUS, **values}, settings)
    return render_cluster(target, description, config, overrides)


# ray up.


@pytest.mark.parametrize(
    "settings",
    [
        ["instance_type=p5.48xlarge"],
        ["provider=local", "head_ip=10.0.0.1", "worker_ips=[10.0.0.2,10.0.0.3,10.0.0.4]"],
    ],
)
def test_ray_up_is_valid_by_rays_own_schema(config, settings):
    (text,) = rendered("ray-up", config, *settings).values()
    values = yaml.safe_load(text)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(values, schema)
    assert values["available_node_types"]["worker"]["min_workers"] == 3
    assert values["available_node_types"]["head"]["resources"] == {"CPU": 96, "GPU": 8}
    assert "--dashboard-host=127.0.0.1" in values["head_start_ray_commands"][1]
    if "head_ip" in values["provider"]:
        assert len(values["provider"]["worker_ips"]) == 3


# KubeRay.

CRDS = Path(__file__).parents[4] / "shared/data/kuberay"
KUBERAY_SETTINGS = [[], ["claim=nfs", "elastic=true", "retries=1"]]


def kuberay_files(config, settings):
    overrides = ["storage=/mnt/runs"] if settings else []
    files = rendered("kuberay", config, *settings, overrides=overrides)
    return {name: list(yaml.safe_load_all(text)) for name, text in files.items()}


def strict(schema):
    """An openAPIV3Schema that also refuses unknown fields, which the API server silently drops."""
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema["type"] = ["integer", "string"]
        schema.pop("anyOf", None)
    if "properties" in schema:
        schema["properties"] = {k: strict(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = strict(schema["items"])
    return schema


@pytest.fixture(scope="module", params=["rayjob", "raycluster"])
def custom_resource(request):
    """One kind of object, and a validator made of KubeRay's own definition of it."""
    path = CRDS / f"ray.io_{request.param}s.yaml"
    if not path.exists():
        pytest.skip(f"needs KubeRay's custom resource definitions in {CRDS}")
    definition = yaml.load(path.read_text(), yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return request.param, jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("settings", KUBERAY_SETTINGS)
def test_kuberay_objects_are_valid_by_kuberays_own_definitions(config, settings, custom_resource):
    kind, validator = custom_resource
    _, made = kuberay_files(config, settings)[f"llama.{kind}.yaml"]
    problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(made)]
    assert not problems
    assert made["kind"].lower() == kind
    # A name of our own invention is found at any depth.
    spec = made["spec"].get("rayClusterSpec", made["spec"])
    spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    assert not validator.is_valid(made)


@pytest.mark.parametrize("settings", KUBERAY_SETTINGS)
def test_kuberay_files_say_what_was_described(config, settings):
    files = kuberay_files(config, settings)
    job_config, job = files["llama.rayjob.yaml"]
    cluster_config, cluster = files["llama.raycluster.yaml"]
    for made in (job, cluster):
        assert made["apiVersion"] == "ray.io/v1"
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["backoffLimit"] == (1 if settings else 3)
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == ((0 if settings else 4), 4)
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert ("storage" in mounts) == bool(settings)
    shared = next(v for v in pod["volumes"] if v["name"] == "shared-memory")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "250Gi"}
    # What the job reads is the configuration that was given, changes and all.
    assert job_config["data"] == cluster_config["data"]
    shipped = yaml.safe_load(job_config["data"]["run.yaml"])
    assert shipped["storage"] == ("/mnt/runs" if settings else "s3://bucket/runs")
    assert shipped["cluster"] == {"num_workers": 32, "gpus_per_worker": 1}


# SkyPilot.


def test_skypilot_is_a_task_of_its_fields(config):
    (text,) = rendered("skypilot", config, "gpu_type=H100").values()
    values = yaml.safe_load(text)
    assert set(values) == {
        "name", "num_nodes", "resources", "workdir", "secrets", "setup", "run"
    }  # fmt: skip
    # SkyPilot refuses to start without a value for what is null; an empty one is no token.
    assert values["secrets"] == {"RAY_AUTH_TOKEN": None, "HF_TOKEN": ""}
    assert values["resources"]["accelerators"] == "H100:8"
    assert values["num_nodes"] == 4
    for script in (values["setup"], values["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=30)


# SLURM.


def test_slurm_scripts_are_shell_and_ask_for_what_was_described(config):
    files = rendered("slurm", config, "partition=gpu", "setup=source env/bin/activate")
    assert set(files) == {"llama.symmetric.sbatch", "llama.classic.sbatch"}
    for text in files.values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)
        lines = text.splitlines()
        assert lines[0] == "#!/bin/bash"
        asked = {line for line in lines if line.startswith("#SBATCH")}
        # sbatch stops looking for them at the first command.
        first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert asked == {line for line in lines[:first] if line.startswith("#SBATCH")}
        assert {
            "#SBATCH --nodes=4",
            "#SBATCH --gpus-per-node=8",
            "#SBATCH --cpus-per-task=96",
            "#SBATCH --partition=gpu",
        } <= asked
        assert "source env/bin/activate" in lines


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_slurm_script_runs_a_whole_pipeline_on_two_nodes(project, tmp_path):
    script = render_for_two_nodes(
        project, tmp_path, "classic", "zero.stage=1", cpus_per_node=2, dense={"enabled": False}
    )
    # The job's number makes the port.
    done = run_script(script, tmp_path, job_id=free_port(), head_ip="127.0.0.1")
    assert "the cluster has 2 nodes" in done.stdout
    assert "sparsity" in done.stdout
    assert list((tmp_path / "runs").glob("report-*/a-*/report.html"))


# Sizes that are not given.


def sizes(config, *settings, **values):
    """Cores and memory that SLURM is asked for of each node."""
    given = {key: GPUS[key] for key in ("name", "nodes", "gpus_per_node")} | values
    files = render_cluster("slurm", describe_cluster(given, settings), config)
    lines = files["llama.classic.sbatch"].splitlines()
    asked = dict(
        line.split("=", 1) for line in lines if line.startswith("#SBATCH --") and "=" in line
    )
    return int(asked["#SBATCH --cpus-per-task"]), asked["#SBATCH --mem"]


def test_cores_and_memory_come_from_the_plan(tmp_path):
    """As counted by hand: ZeRO 3 over 16 workers with the optimizer offloaded, in bf16."""
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "70b")
    recipe = tmp_path / "run.yaml"
    base = ROOT / "configs" / "large" / "llama-3.1-70b.yaml"
    recipe.write_text(f"extends: {base}\nstorage: /mnt/runs\nmodel: {{path: {tmp_path / '70b'}}}\n")
    # Of 70,553,706,496 parameters 12 bytes each over 16 workers (masters, Adam), a bit of each of
    # 68,451,041,280 prunable ones; 1.5 GiB for the export. And 6 GiB a worker. Gradients are
    # pinned, in powers of two: 32 GiB for 16.4 as they are summed; 4 GiB for each of four sub-groups of a
    # billion at the step, 1 GiB for the rest, 512 MiB for embeddings and 512 KiB for vectors.
    pinned = (32 + 4 * 4 + 1) * 2**30 + 2**29 + 2**19
    offloaded = 8 * ((70_553_706_496 * 12 + 68_451_041_280 / 8) / 16 + pinned)
    memory = math.ceil(offloaded / 2**30 + 1.5) + 8 * 6 + 8
    assert sizes(str(recipe), nodes=2) == (8 * 12, f"{memory}G")
    assert 845 < memory < 860
    recipe.write_text(recipe.read_text() + "train: {checkpoint_writing: background}\n")
    copied = 8 * (70_553_706_496 * 12 + 68_451_041_280 / 8) / 16
    with_copies = math.ceil((offloaded + copied) / 2**30 + 1.5) + 8 * 6 + 8
    assert sizes(str(recipe), nodes=2) == (8 * 12, f"{with_copies}G")
    assert sizes(str(recipe), "cpus_per_node=128", "memory_gib=1900", nodes=2) == (128, "1900G")


def test_sizes_of_a_campaign_are_those_of_its_largest_run(config, tmp_path):
    campaign = {
        "name": "several",
        "storage": "s3://bucket/runs",
        "recipe": config,
        "tasks": {"words": {}},
        "methods": {"mgpp": {"prune": {"method": {"name": "mgpp"}}}},
        "sparsities": [0.5],
        "runs": [
            {
                "task": "words",
                "method": "mgpp",
                "sparsity": 0.7,
                "changes": {"cluster": {"num_workers": 32, "cpus_per_worker": 3}},
            }
        ],
    }
    path = tmp_path / "campaign.yaml"
    path.write_text(yaml.safe_dump(campaign))
    description = describe_cluster({"name": "llama", "nodes": 4, "gpus_per_node": 8}, [])
    files = render_cluster("slurm", description, str(path), command="campaign")
    assert "#SBATCH --cpus-per-task=24" in files["llama.classic.sbatch"].splitlines()


def test_a_run_that_cannot_be_planned_is_told_what_to_give(config):
    values = yaml.safe_load(Path(config).read_text())
    values["model"] = {"path": "someone/gated-model"}
    Path(config).write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"^--memory-gib: missing, and the run cannot be planned"):
        sizes(config)
    assert sizes(config, memory_gib=100) == (8, "100G")


# A token of the hub reaches every node, by no file.

TOKEN = "hf_a-token-that-no-file-may-hold"
TARGETS = {
    "kuberay": [],
    "slurm": [],
    "skypilot": ["gpu_type=H100"],
    "ray-up": ["instance_type=p5.48xlarge"],
}


@pytest.mark.parametrize("target", TARGETS)
def test_no_rendered_file_holds_a_secret(config, target, monkeypatch):
    without = rendered(target, config, *TARGETS[target])
    for name in (*SECRETS, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRETS.get(name, TOKEN))
    files = rendered(target, config, *TARGETS[target])
    assert files == without
    for text in files.values():
        assert not any(secret in text for secret in (TOKEN, *SECRETS.values()))
        assert "HF_TOKEN" in text


def environments_of(node):
    """The environments of Kubernetes' containers, as far down as there are some."""
    if isinstance(node, list):
        return [found for inner in node for found in environments_of(inner)]
    if not isinstance(node, dict):
        return []
    own = [node["env"]] if "env" in node else []
    return own + environments_of(list(node.values()))


@pytest.mark.parametrize("target", TARGETS)
def test_every_cluster_asks_for_a_token(config, target):
    for text in rendered(target, config, *TARGETS[target]).values():
        assert "RAY_USE_TLS" not in text
        if target == "kuberay":
            found = environments_of(list(yaml.safe_load_all(text)))
            assert len(found) == 2  # of the head and of workers
            for environment in found:
                named = {entry["name"]: entry for entry in environment}
                assert named["RAY_AUTH_MODE"]["value"] == "token"
                assert "secretKeyRef" in named["RAY_AUTH_TOKEN"]["valueFrom"]
        elif target == "ray-up":
            values = yaml.safe_load(text)
            # Ray copies it to every node before it starts there.
            assert values["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
            for kind in ("head", "worker"):
                start = values[f"{kind}_start_ray_commands"][-1]
                assert start.index("export RAY_AUTH_MODE=token;") < start.index("ray start")
        else:
            script = yaml.safe_load(text)["run"] if target == "skypilot" else text
            assert script.index("export RAY_AUTH_MODE=token\n") < script.index("ray s")


@pytest.mark.parametrize("target", TARGETS)
def test_the_dashboard_is_on_loopback(config, target):
    """But with KubeRay, whose service of the dashboard is reached from outside of the pod."""
    for text in rendered(target, config, *TARGETS[target]).values():
        hosts = re.findall(r"dashboard-host[=:]\s*\"?([^\s\"]+)", text)
        assert hosts == (["0.0.0.0"] if target == "kuberay" else ["127.0.0.1"])


@pytest.mark.parametrize(
    "target", sorted({*TARGETS} - {"ray-up"})
)  # its file holds no configuration
def test_a_configuration_with_the_token_in_it_is_refused(config, target, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    given = f"storage=s3://{TOKEN}"
    with pytest.raises(ConfigError) as caught:
        rendered(target, config, *TARGETS[target], overrides=[given])
    for problem in caught.value.problems:
        assert str(problem).startswith(f"{config}: it would write the token in HF_TOKEN to llama.")
        assert TOKEN not in str(problem)


def test_every_pod_has_the_token_of_a_secret_if_there_is_one(config):
    _, cluster = kuberay_files(config, [])["llama.raycluster.yaml"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        (token,) = [entry for entry in container["env"] if entry["name"] == "HF_TOKEN"]
        reference = {"name": "llama-hub", "key": "token", "optional": True}
        assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}


def on_four_nodes(folder, **stand_ins):
    """Return the environment of a job of four nodes, with stand-ins for Slurm, Ray and mgpp."""
    binaries = write_stand_ins(folder, [""] * 4, **stand_ins)
    return {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "HOME": str(folder),
        "SLURM_JOB_NODELIST": "four",
        "SLURM_JOB_ID": "1",
    }


def tokens_seen(script, folder, env=()):
    """Run a script with stand-ins for Ray and mgpp; return each command with the token it had."""
    told = folder / "told"
    said = f'echo "${{0##*/}} $1 $2 ${{HF_TOKEN:-none}}" >> {told}'
    # The run ends when all nodes have started, as the script then stops them.
    all_there = f'until [[ $1 != run || $(grep -c "^ray start" {told}) == 4 ]]; do sleep 0.05; done'
    environment = on_four_nodes(
        folder,
        ray=f"#!/bin/bash\n{said}\n",
        mgpp=f"#!/bin/bash\n{said}\n{all_there}\n",
    )
    environment |= dict(env)
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=60)
    return [line.split() for line in told.read_text().splitlines()]


@pytest.mark.parametrize("form", ["classic", "symmetric"])
def test_slurm_passes_the_token_on_to_every_node(config, form, tmp_path):
    script = rendered("slurm", config)[f"llama.{form}.sbatch"]
    seen = tokens_seen(script, tmp_path, {"HF_TOKEN": TOKEN})
    assert {words[-1] for words in seen} == {TOKEN}
    starts = [words for words in seen if words[:2] in (["ray", "start"], ["ray", "symmetric-run"])]
    assert len(starts) == 4


@pytest.mark.parametrize("command", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_up_starts_every_node_with_what_setup_sets(config, command, tmp_path):
    settings = [*TARGETS["ray-up"], f"setup='export HF_TOKEN=$(echo {TOKEN})'"]
    (text,) = rendered("ray-up", config, *settings).values()
    values = yaml.safe_load(text)
    assert "--env=HF_TOKEN" in values["docker"]["run_options"]
    (seen,) = tokens_seen(values[command][-1], tmp_path)
    assert seen == ["ray", "start", seen[2], TOKEN]


# A run that is asked to stop has its time.

GRACE = 77
TIMES = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": GRACE, "RAY_JOB_STOP_WAIT_TIME_S": GRACE + 30}


@pytest.mark.parametrize("target", TARGETS)
def test_ray_waits_as_long_as_a_run_may_take_to_stop(config, target):
    given = [f"cluster.stop_grace_s={GRACE}"]
    files = rendered(target, config, *TARGETS[target], overrides=given)
    for text in files.values():
        for name, seconds in TIMES.items():
            found = re.findall(rf'{name}(?:=|, value: ")(\d+)', text)
            assert found, (name, text)
            assert {int(value) for value in found} == {seconds}


def test_every_pod_ends_only_after_that(config):
    for file in kuberay_files(config, []).values():
        spec = file[1]["spec"]
        spec = spec.get("rayClusterSpec", spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            values = {entry["name"]: entry.get("value") for entry in container["env"]}
            waits = int(values["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert waits == 120 < int(values["RAY_JOB_STOP_WAIT_TIME_S"])
            assert pod["terminationGracePeriodSeconds"] > waits


def test_a_campaign_has_the_time_of_its_most_patient_run(config, tmp_path):
    campaign = {
        "name": "several",
        "storage": "s3://bucket/runs",
        "recipe": config,
        "tasks": {"words": {}},
        "methods": {
            "mgpp": {"prune": {"method": {"name": "mgpp"}}, "cluster.stop_grace_s": 300},
            "gmp": {"prune": {"method": {"name": "gmp"}}, "cluster.stop_grace_s": 200},
        },
        "sparsities": [0.5],
    }
    path = tmp_path / "campaign.yaml"
    path.write_text(yaml.safe_dump(campaign))
    files = render_cluster("slurm", describe_cluster(GPUS, []), str(path), command="campaign")
    for text in files.values():
        assert "#SBATCH --signal=B:TERM@360\n" in text


@pytest.mark.parametrize("form", ["classic", "symmetric"])
def test_slurm_s_signal_comes_to_mgpp_and_the_script_ends_as_it_does(config, form, tmp_path):
    script = rendered("slurm", config)[f"llama.{form}.sbatch"]
    # Ray's own answer to the signal is to end at once.
    ray = '[ "$1" = symmetric-run ] || sleep 60\nuntil [ "$1" = -- ]; do shift; done\nshift\n"$@"'
    stops = (
        "trap 'sleep 0.3; touch saved; exit 143' TERM\ntouch begun\nwhile :; do sleep 0.05; done"
    )
    environment = on_four_nodes(
        tmp_path,
        ray=f"#!/bin/bash\n[ $SLURM_PROCID = 0 ] || exit 0\n{ray}\n",
        mgpp=f'#!/bin/bash\n[ "$1" = run ] || exit 0\n{stops}\n',
    )
    environment["RAY_AUTH_TOKEN"] = "a-token"
    process = subprocess.Popen(
        ["bash", "-c", script], env=environment, cwd=tmp_path, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert (tmp_path / "saved").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# What a campaign names goes with it.


def mounted_at(folder, files):
    """Write a ConfigMap's files as Kubernetes mounts them."""
    folder.mkdir()
    config_map, _ = yaml.safe_load_all(files["llama.rayjob.yaml"])
    for name, text in config_map["data"].items():
        assert re.fullmatch(r"[-._a-zA-Z0-9]+", name)
        (folder / name).write_text(text)
    return config_map["data"]


def kuberay_at(folder, config, *overrides, command):
    """Render for a cluster whose pods have the files in a folder of this machine."""
    description = describe_cluster(GPUS, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mounted, "FOLDER", str(folder))
        files = render_cluster("kuberay", description, config, overrides, command=command)
    return mounted_at(folder, files), files


@pytest.fixture
def campaign(project, tmp_path, monkeypatch):
    """A campaign in a folder of its own: its recipes extend others, and start from another run."""
    monkeypatch.chdir(tmp_path)
    run = yaml.safe_load((project / "run.yaml").read_text()) | {"storage": "runs"}
    upstream = {"extends": "../shared/base.yaml", "name": "up", "train": {"lr": 0.001}}
    files = {
        "shared/base.yaml": run,
        "upstream/up.yaml": upstream,
        "recipes/first.yaml": {"extends": "../shared/base.yaml", "name": "first"},
        "recipes/second.yaml": {
            "extends": "first.yaml",
            "model": {"path": "run:upstream/up.yaml train.lr=0.002"},
        },
        "campaigns/both.yaml": {
            "name": "both",
            "recipe": "../recipes/first.yaml",
            "tasks": {"one": {}, "two": {"recipe": "../recipes/second.yaml"}},
            "models": {"own": {}, "other": {"model.path": "run:upstream/up.yaml"}},
            "methods": {"GMP": {"prune": {"method": {"name": "gmp"}}}},
            "sparsities": [0.5],
        },
    }
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(values))
    return "campaigns/both.yaml"


def test_kuberay_ships_all_files_that_a_campaign_names(campaign, tmp_path, monkeypatch):
    pods = tmp_path / "pods"
    data, files = kuberay_at(pods, campaign, "storage=/mnt/runs", command="campaign")
    assert len(data) == 5
    assert (
        'entrypoint: "mgpp campaign /etc/mgpp/run.yaml changes.cluster.address=auto"'
        in files["llama.rayjob.yaml"]
    )
    here = campaign_runs(read_campaign(campaign, ["storage=/mnt/runs"]))
    monkeypatch.chdir("/")  # where nothing of it lies
    there = campaign_runs(read_campaign(str(pods / "run.yaml"), ["changes.cluster.address=auto"]))
    upstreams = set()
    for before, after in zip(here, there, strict=True):
        assert before.title == after.title
        shipped, problems = read_config(after.recipe, after.overrides)
        assert problems == []
        monkeypatch.chdir(tmp_path)
        values, problems = read_config(before.recipe, before.overrides)
        monkeypatch.chdir("/")
        assert problems == []
        assert shipped["cluster"].pop("address") == "auto"
        if values["model"]["path"].startswith("run:"):
            reference, *changes = values["model"].pop("path").split()
            assert reference == "run:upstream/up.yaml"
            file, *shipped_changes = shipped["model"].pop("path").removeprefix("run:").split()
            assert shipped_changes == changes
            upstreams.add(file)
        assert shipped == values
    (upstream,) = upstreams
    shipped, problems = read_config(upstream)
    assert problems == []
    values, _ = read_config(str(tmp_path / "upstream" / "up.yaml"))
    assert shipped == values | {"storage": "/mnt/runs"}  # one that pods share


def test_kuberay_ships_the_recipe_of_a_run_s_model(campaign, tmp_path):
    data, files = kuberay_at(
        tmp_path / "pods", "recipes/second.yaml", "storage=s3://bucket/runs", command="run"
    )
    assert len(data) == 3
    assert "mgpp run /etc/mgpp/run.yaml cluster.address=auto" in files["llama.rayjob.yaml"]
    reference = yaml.safe_load(data["run.yaml"])["model"]["path"]
    file, change = reference.removeprefix("run:").split()
    assert change == "train.lr=0.002"
    assert read_config(file)[0]["name"] == "up"


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "configs/campaigns").glob("*"))
)
def test_every_campaign_of_ours_can_be_shipped(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    pods = tmp_path / "pods"
    kuberay_at(pods, f"configs/campaigns/{name}", "storage=/mnt/runs", command="campaign")
    monkeypatch.chdir("/")
    runs = campaign_runs(read_campaign(str(pods / "run.yaml")))
    for run in {run.recipe: run for run in runs}.values():
        values, problems = read_config(run.recipe, run.overrides)
        assert problems == []
        parse_config(values)


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("campaigns/both.yaml", {"recipe": "nowhere.yaml"}, "recipe: not a file"),
        ("campaigns/both.yaml", {"changes": {"model.path": "run:no.yaml"}}, "no.yaml: no such file"),
        ("recipes/first.yaml", {"extends": "no.yaml"}, "recipes/no.yaml: no such file"),
        ("campaigns/both.yaml", {"changes": {"a": "run:'a"}}, "\"run:'a\": No closing quotation"),
        ("shared/base.yaml", {"name": "${"}, "shared/base.yaml: "),
    ],
)  # fmt: skip
def test_a_file_that_is_not_there_is_not_shipped(campaign, tmp_path, file, changes, complaint):
    values = yaml.safe_load((tmp_path / file).read_text()) | changes
    (tmp_path / file).write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        kuberay_at(tmp_path / "pods", campaign, "storage=/mnt/runs", command="campaign")
    assert any(str(p).startswith(complaint) for p in caught.value.problems), caught.value.problems


def test_files_that_a_config_map_cannot_hold_are_refused(campaign, tmp_path):
    path = tmp_path / "shared" / "base.yaml"
    values = yaml.safe_load(path.read_text())
    values["data"]["train"] = "rows" * 250_000
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="more than a ConfigMap holds"):
        kuberay_at(tmp_path / "pods", campaign, "storage=/mnt/runs", command="campaign")


@pytest.mark.parametrize("form", ["classic", "symmetric"])
def test_a_campaign_on_slurm_joins_the_cluster(campaign, form):
    description = describe_cluster(GPUS, [])
    files = render_cluster(
        "slurm", description, campaign, ["storage=/mnt/runs"], command="campaign"
    )
    joins = " changes.cluster.address=auto" if form == "symmetric" else ""  # or RAY_ADDRESS
    wanted = f"mgpp campaign campaigns/both.yaml storage=/mnt/runs{joins} &"
    assert wanted in files[f"llama.{form}.sbatch"]


# What is refused.


@pytest.mark.parametrize(
    ("target", "values", "settings", "complaint"),
    [
        ("kuberay", {"image": None}, [], "--image: missing"),
        ("skypilot", {}, [], "--set gpu_type: missing"),
        ("ray-up", {}, [], "--set instance_type: missing"),
        ("ray-up", {}, ["provider=local", "head_ip=a"], "--set worker_ips: got 0; 4 nodes are"),
        ("slurm", {"nodes": 3}, [], "cluster.num_workers: got 32 workers"),
        ("slurm", {"nodes": 0}, [], "nodes: "),
        ("slurm", {"name": "Not a name"}, [], "name: "),
        ("slurm", {}, ["colour=red"], "--set colour=red: must be key=value; keys are name, nodes"),
        ("slurm", {}, ["shared_memory_gib=2000"], "shared_memory_gib: "),
        ("slurm", {}, ["time_limit=1;rm"], "time_limit: "),
    ],
)
def test_what_cannot_be_is_told(config, target, values, settings, complaint):
    with pytest.raises(ConfigError) as caught:
        rendered(target, config, *settings, **values)
    assert any(str(p).startswith(complaint) for p in caught.value.problems), caught.value.problems


def test_a_storage_that_nodes_do_not_share_is_refused(config):
    with pytest.raises(ConfigError, match="all nodes share"):
        rendered("slurm", config, overrides=["storage=runs"])


def test_overrides_reach_the_shell_as_they_are(config):
    files = rendered("slurm", config, overrides=["train.lr=1e-4", "prune.method={name: gmp}"])
    assert "run.yaml train.lr=1e-4 'prune.method={name: gmp}'" in files["llama.classic.sbatch"]
