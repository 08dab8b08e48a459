"""Files that start a cluster and a run on it, for ray up, KubeRay, SLURM and SkyPilot."""

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import jinja2

from launch.cluster.description import ClusterDescription, line_fault
from launch.cluster.jobs import STOP_SECONDS
from launch.cluster.mounted import mounted_files, token_problems
from launch.cluster.node_sizes import planned_cores, runs_of
from launch.cluster.reading_back import misread
from launch.cluster.stop_grace import stop_grace_of
from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import RunConfig, parse_config, read_config
from pipeline.runs.foreign_code import OPTION
from pipeline.runs.hardware import Capacity, Hardware, settled
from pipeline.runs.validate import cluster_problems, core_problems

Target = Literal["ray-up", "kuberay", "slurm", "skypilot"]

_TEMPLATES: dict[str, dict[str, str]] = {
    "ray-up": {"ray-up.yaml": "ray-up.yaml.jinja"},
    "kuberay": {
        "rayjob.yaml": "kuberay-rayjob.yaml.jinja",
        "raycluster.yaml": "kuberay-raycluster.yaml.jinja",
    },
    "slurm": {
        "symmetric.sbatch": "slurm-symmetric.sh.jinja",
        "classic.sbatch": "slurm-classic.sh.jinja",
    },
    "skypilot": {"skypilot.yaml": "skypilot.yaml.jinja"},
}
TARGETS = tuple(_TEMPLATES)


def render_cluster(
    target: Target,
    description: ClusterDescription,
    config: str,
    overrides: Sequence[str] = (),
    *,
    command: str = "run",
    allow_code: bool = False,
) -> dict[str, str]:
    """Return the files of a target by name.

    Args:
        target: what they are for.
        description: of the cluster.
        config: the YAML file to run there: a run's, or a campaign's where that is the command.
        overrides: `key=value` changes to it.
        command: of mgpp.
        allow_code: whether the configuration may name code from outside of mgpp.

    Raises:
        ConfigError: if something is missing, the cluster cannot hold the run's workers, a value cannot
            stand in a file, or a file would hold a token of this machine's environment.
    """
    problems = _line_problems(config, overrides)
    if problems:
        raise ConfigError(problems)
    problems = description.problems_for(target)
    values, wrong = read_config(config, overrides)
    storage = str(values.get("storage", "runs"))
    problems += wrong
    if not wrong and command == "campaign":
        problems += _campaign_problems(config, overrides)
    elif not wrong:
        problems += _capacity_problems(parse_config(values, allow_code=allow_code), description)
    problems += _storage_problems(storage)
    if problems:
        raise ConfigError(problems)
    if description.cpus_per_node is None or description.memory_gib is None:
        runs = runs_of(config, overrides, campaign=command == "campaign", allow_code=allow_code)
        description = description.sized_for(runs)
    assert description.memory_gib is not None
    environment = _environment()
    program = ["mgpp", command, *([OPTION] if allow_code else [])]
    file_of_run = f"./{config}" if config.startswith("-") else config
    given = {
        **description.model_dump(),
        "shared_memory_gib": description.shared_memory_gib or max(description.memory_gib // 4, 1),
        "config": config,
        "config_path": file_of_run,
        "mounted": {},
        "stop_grace_s": stop_grace_of(config, overrides, campaign=command == "campaign"),
        "stop_margin_s": STOP_SECONDS,
        "overrides": list(overrides),
        "command": " ".join(program),
        "words": [*program, file_of_run, *overrides],
        "campaign": command == "campaign",
        "join": f"{'changes.' if command == 'campaign' else ''}cluster.address=auto",
        "storage": storage,
        "ray_version": version("ray"),
    }
    if target == "kuberay":
        given["mounted"] = mounted_files(config, values, command=command, storage=storage)
    given["cluster"] = environment.get_template("_ray-cluster.yaml.jinja").render(given)
    files = {}
    for suffix, template in _TEMPLATES[target].items():
        file = f"{description.name}.{suffix}"
        files[file] = environment.get_template(template).render(given, file=file)
    problems = token_problems(config, files) or misread(target, files, given)
    if problems:
        raise ConfigError(problems)
    return files


def _line_problems(config: str, overrides: Sequence[str]) -> list[Problem]:
    """Return which of the words that nodes are to run cannot stand in a file."""
    words = [("CONFIG", config), *((change.partition("=")[0], change) for change in overrides)]
    return [Problem(key, fault, got=word) for key, word in words if (fault := line_fault(word))]


def _capacity_problems(run: RunConfig, description: ClusterDescription) -> list[Problem]:
    """Return what of a run the cluster cannot hold."""
    cores = description.cpus_per_node or planned_cores([run], description.nodes)
    nodes = ((float(cores), float(description.gpus_per_node)),)
    capacity = Capacity(nodes=nodes * description.nodes)
    settings = settled(run, Hardware(capacity=capacity, has_bf16=lambda: True))
    return [
        *cluster_problems(settings.cluster, capacity),
        *core_problems(settings.data, capacity),
    ]


def _storage_problems(storage: str) -> list[Problem]:
    """Return why nodes could not share a storage, or a file could not hold its address."""
    problems = []
    if "://" not in storage and not Path(storage).is_absolute():
        hint = "give an absolute path that all nodes share, or a URL (storage=s3://...)"
        problems.append(Problem("storage", got=storage, hint=hint))
    if fault := line_fault(storage):
        problems.append(Problem("storage", fault, got=storage))
    return problems


def _campaign_problems(config: str, overrides: Sequence[str]) -> list[Problem]:
    from pipeline.campaigns.grid import read_campaign

    try:
        read_campaign(config, overrides)
    except ConfigError as error:
        return error.problems
    return []


def _environment() -> jinja2.Environment:
    # Nothing here is HTML: strings go into YAML by `tojson` and `block`, into shell by `sh`.
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.PackageLoader("launch.cluster"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON is YAML; Jinja's own filter escapes it for HTML.
    environment.filters["tojson"] = _as_yaml
    environment.filters["block"] = _as_block
    environment.filters["sh"] = shlex.quote
    return environment


def _as_yaml(value: object) -> str:
    """Return a value as JSON, with escapes for what YAML reads as line breaks or does not read at all."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _as_block(text: str, indent: int) -> str:
    """Return text as a YAML value of several lines; in one line, quoted, where those would differ."""
    lines = text.removesuffix("\n").split("\n")
    plain = text.endswith("\n") and all(map(str.isprintable, lines))
    if not plain or lines[0][:1] in ("", " ") or not lines[-1].strip():
        return _as_yaml(text)
    return "\n".join(["|", *(" " * indent + line for line in lines)])
