"""What rendered files say, read back from them as those who take them read them.

Each reader returns, by file, the keys of the description that stand there, and what is run. What a value
does to the text around it shows in what is read back: it is another value, or another key's.
"""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from launch.cluster.mounted import MAIN_FILE
from pipeline.errors import Problem

_SBATCH = "#SBATCH "


def misread(target: str, files: Mapping[str, str], described: Mapping[str, Any]) -> list[Problem]:
    """Return which values of a description are not what its files say.

    Args:
        target: what the files are for.
        files: their texts by name.
        described: what they are to say, by key.
    """
    problems = []
    for file, text in files.items():
        try:
            said = _READERS[target](text, described)
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = f"with these values it cannot be read: {' '.join(str(error).split())}"
            problems.append(Problem(file, why))
            continue
        problems += [
            Problem(key, f"{file} would say {value!r}", got=described[key])
            for key, value in said.items()
            if value != described[key]
        ]
    return problems


def _slurm(text: str, described: Mapping[str, Any]) -> dict[str, Any]:
    lines = text.splitlines()
    # sbatch looks for options until the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    asked = dict(_option(line) for line in lines[:first] if line.startswith(_SBATCH))
    setup = described["setup"]
    return {
        "name": asked["--job-name"],
        "nodes": int(asked["--nodes"]),
        "cpus_per_node": int(asked["--cpus-per-task"]),
        "gpus_per_node": int(asked.get("--gpus-per-node", 0)),
        "memory_gib": int(asked["--mem"].removesuffix("G")),
        "time_limit": asked["--time"],
        "partition": asked.get("--partition"),
        "setup": setup if setup is None or f"\n{setup}\n" in text else None,
        "words": _words_run(text, described, ["&"], [described["join"], "&"]),
    }


def _option(line: str) -> tuple[str, str]:
    (option,) = shlex.split(line.removeprefix(_SBATCH), comments=True)
    name, _, value = option.partition("=")
    return name, value


def _skypilot(text: str, described: Mapping[str, Any]) -> dict[str, Any]:
    task = yaml.safe_load(text)
    resources = task["resources"]
    kind, _, gpus = resources.get("accelerators", ":0").rpartition(":")
    lines = task["run"].splitlines()
    return {
        "name": task["name"],
        "nodes": task["num_nodes"],
        "cpus_per_node": int(resources["cpus"].removesuffix("+")),
        "gpus_per_node": int(gpus),
        "memory_gib": int(resources["memory"].removesuffix("+")),
        "image": _after("docker:", resources.get("image_id")),
        "retries": resources["job_recovery"]["max_restarts_on_errors"],
        "install": task["setup"].removesuffix("\n"),
        "port": next(int(line[5:]) for line in lines if line.startswith("port=")),
        "words": _words_run(task["run"], described, []),
        **({"gpu_type": kind} if gpus != "0" else {}),
    }


def _ray_up(text: str, described: Mapping[str, Any]) -> dict[str, Any]:
    cluster = yaml.safe_load(text)
    provider, kinds = cluster["provider"], cluster["available_node_types"]
    worker = kinds["worker"]
    start = cluster["head_start_ray_commands"][-1]
    setup, _, ray = start.removesuffix("\n").rpartition("\n")
    said = {
        "name": cluster["cluster_name"],
        "nodes": worker["min_workers"] + 1,
        "cpus_per_node": worker["resources"]["CPU"],
        "gpus_per_node": worker["resources"]["GPU"],
        "image": cluster.get("docker", {}).get("image"),
        "provider": provider["type"],
        "ssh_user": cluster["auth"]["ssh_user"],
        "install": cluster["setup_commands"][0].removesuffix("\n"),
        "setup": setup or None,
        "port": next(int(w[7:]) for w in shlex.split(ray) if w.startswith("--port=")),
    }
    if provider["type"] == "local":
        return said | {key: provider[key] for key in ("head_ip", "worker_ips")}
    node = worker["node_config"]
    return said | {"region": provider["region"], "instance_type": node["InstanceType"]}


def _kuberay(text: str, described: Mapping[str, Any]) -> dict[str, Any]:
    config_map, made = yaml.safe_load_all(text)
    spec = made["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    (group,) = cluster["workerGroupSpecs"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    (image,) = {container["image"], head["image"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    said = {
        "name": made["metadata"]["name"],
        "nodes": group["maxReplicas"],
        "elastic": group["minReplicas"] == 0,
        "cpus_per_node": limits["cpu"],
        "gpus_per_node": limits.get("nvidia.com/gpu", 0),
        "memory_gib": int(limits["memory"].removesuffix("Gi")),
        "shared_memory_gib": int(
            volumes["shared-memory"]["emptyDir"]["sizeLimit"].removesuffix("Gi")
        ),
        "image": image,
        "claim": volumes.get("storage", {}).get("persistentVolumeClaim", {}).get("claimName"),
        "port": head["ports"][0]["containerPort"],
        "mounted": config_map["data"],
        **({"storage": mounts["storage"]} if "storage" in mounts else {}),
    }
    if made["kind"] == "RayCluster":
        return said
    words = shlex.split(spec["entrypoint"])
    mounted = [*described["command"].split(), MAIN_FILE, described["join"]]
    given = described["words"] if words == mounted else words
    return said | {"retries": spec["backoffLimit"], "words": given}


def _words_run(script: str, described: Mapping[str, Any], *ends: list[str]) -> list[str]:
    """Return the words of the last line that runs mgpp, without an end that they may have."""
    lines = [line.strip() for line in script.splitlines()]
    line = next(line for line in reversed(lines) if line.startswith(f"{described['command']} "))
    words = shlex.split(line)
    wanted: list[str] = described["words"]
    return wanted if any(words == [*wanted, *end] for end in ends) else words


def _after(prefix: str, text: str | None) -> str | None:
    return None if text is None else text.removeprefix(prefix)


_READERS: dict[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
    "slurm": _slurm,
    "skypilot": _skypilot,
    "ray-up": _ray_up,
    "kuberay": _kuberay,
}
