"""Files that start a cluster and a run on it, for ray up, KubeRay, SLURM and SkyPilot."""

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import jinja2
import yaml
from pydantic import Field, ValidationError, model_validator

from launch.cluster.jobs import STOP_SECONDS
from launch.cluster.mounted import mounted_files, token_problems
from launch.cluster.node_sizes import planned_cores, planned_memory_gib, runs_of
from launch.cluster.stop_grace import stop_grace_of
from pipeline.errors import ConfigError, Problem, SettingError
from pipeline.runs.config import RunConfig, parse_config, problem_of, read_config, yaml_text
from pipeline.runs.foreign_code import OPTION
from pipeline.runs.hardware import Capacity, Hardware, settled
from pipeline.runs.plain_yaml import check_yaml
from pipeline.runs.validate import cluster_problems, core_problems
from pipeline.section import NotNegative, Positive, Section

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


class ClusterDescription(Section):
    """What a cluster is to be, whatever starts it."""

    name: str = Field(pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")
    """Of the cluster: lower case, digits and dashes, as Kubernetes wants it."""
    nodes: Positive
    """Machines that train; one of them is the head, but for Kubernetes, where a small head is added."""
    gpus_per_node: NotNegative = 0
    """GPUs of each."""
    cpus_per_node: Positive | None = None
    """Cores of each; those that the run's workers have unless given."""
    memory_gib: Positive | None = None
    """Memory of each, GiB; what `mgpp plan` counts unless given."""
    shared_memory_gib: Positive | None = None
    """Of that for /dev/shm, GiB; a quarter unless given."""
    image: str | None = None
    """Container image with mgpp in it; needed for kuberay."""
    install: str = "pip install 'mgpp[pipeline]'"
    """Shell command that installs mgpp, where there is no image."""
    retries: NotNegative = 3
    """How often a job is tried again."""
    elastic: bool = False
    """kuberay: whether workers are started only as a run asks for them."""
    claim: str | None = None
    """kuberay: the persistent volume claim that is mounted at the run's `storage`."""
    provider: Literal["aws", "local"] = "aws"
    """ray-up: where machines come from."""
    region: str = "us-west-2"
    """ray-up on aws."""
    instance_type: str | None = None
    """ray-up on aws: such as p5.48xlarge; needed there."""
    head_ip: str | None = None
    """ray-up on local machines: of the head; needed there."""
    worker_ips: list[str] = []
    """ray-up on local machines: of the others."""
    ssh_user: str = "ubuntu"
    """ray-up."""
    gpu_type: str | None = None
    """skypilot: such as H100; needed where there are GPUs."""
    partition: str | None = None
    """slurm."""
    time_limit: str = Field(default="24:00:00", pattern=r"^[0-9:-]+$")
    """slurm."""
    setup: str | None = None
    """slurm, ray-up: shell lines before Ray starts, such as `source venv/bin/activate`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 6379
    """Of the head's GCS."""

    @model_validator(mode="after")
    def _check(self) -> "ClusterDescription":
        if self.memory_gib is not None and (self.shared_memory_gib or 0) > self.memory_gib:
            raise SettingError(
                Problem(
                    "shared_memory_gib",
                    f"must not exceed memory_gib, {self.memory_gib}",
                    got=self.shared_memory_gib,
                )
            )
        return self

    def sized_for(self, runs: Sequence[RunConfig]) -> "ClusterDescription":
        """Return the description with cores and memory, as the runs need them where they are not given.

        Raises:
            ConfigError: if a run's memory cannot be planned, or is less than is to be shared.
        """
        sizes = {"cpus_per_node": self.cpus_per_node, "memory_gib": self.memory_gib}
        if self.cpus_per_node is None:
            sizes["cpus_per_node"] = planned_cores(runs, self.nodes)
        if self.memory_gib is None:
            has_gpus = self.gpus_per_node > 0
            sizes["memory_gib"] = planned_memory_gib(runs, self.nodes, has_gpus=has_gpus)
        return _checked(self.model_dump() | sizes)

    def problems_for(self, target: str) -> list[Problem]:
        """Return what a target needs and was not given."""
        problems = []
        if target == "kuberay" and not self.image:
            problems.append(
                Problem(
                    "--image", "missing", hint="kuberay needs a container image with mgpp in it"
                )
            )
        if target == "skypilot" and self.gpus_per_node and not self.gpu_type:
            problems.append(
                Problem(
                    "--set gpu_type",
                    "missing",
                    hint="skypilot needs the kind of GPU, such as H100",
                )
            )
        if target == "ray-up" and self.provider == "aws" and not self.instance_type:
            problems.append(Problem("--set instance_type", "missing", hint="such as p5.48xlarge"))
        if target == "ray-up" and self.provider == "local":
            if not self.head_ip:
                problems.append(
                    Problem("--set head_ip", "missing", hint="the address of the head machine")
                )
            if len(self.worker_ips) != self.nodes - 1:
                problems.append(
                    Problem(
                        "--set worker_ips",
                        got=len(self.worker_ips),
                        hint=f"{self.nodes} nodes are the head and {self.nodes - 1} others",
                    )
                )
        return problems


def describe_cluster(values: dict[str, object], changes: Sequence[str]) -> ClusterDescription:
    """Return a description.

    Args:
        values: by key.
        changes: `key=value`, the value YAML.

    Raises:
        ConfigError: with every problem.
    """
    more, problems = {}, []
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in ClusterDescription.model_fields:
            problems.append(
                Problem(
                    f"--set {change}",
                    "must be key=value",
                    hint=f"keys are {', '.join(ClusterDescription.model_fields)}",
                )
            )
            continue
        try:
            check_yaml(value)
            more[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(Problem(f"--set {change}", yaml_text(error)))
    if problems:
        raise ConfigError(problems)
    return _checked({**values, **more})


def _checked(values: dict[str, object]) -> ClusterDescription:
    try:
        return ClusterDescription.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problem_of(item, whole="cluster") for item in error.errors()) from None


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
        ConfigError: if something is missing, the cluster cannot hold the run's workers, or a file would
            hold a token of this machine's environment.
    """
    problems = description.problems_for(target)
    values, wrong = read_config(config, overrides)
    problems += wrong or (_campaign_problems(config, overrides) if command == "campaign" else [])
    storage = str(values.get("storage", "runs"))
    if not wrong and command == "run":
        run = parse_config(values, allow_code=allow_code)
        cores = description.cpus_per_node or planned_cores([run], description.nodes)
        nodes = ((float(cores), float(description.gpus_per_node)),)
        capacity = Capacity(nodes=nodes * description.nodes)
        settings = settled(run, Hardware(capacity=capacity, has_bf16=lambda: True))
        problems += cluster_problems(settings.cluster, capacity)
        problems += core_problems(settings.data, capacity)
    if "://" not in storage and not Path(storage).is_absolute():
        problems.append(
            Problem(
                "storage",
                got=storage,
                hint="give an absolute path that all nodes share, or a URL (storage=s3://...)",
            )
        )
    if problems:
        raise ConfigError(problems)
    if description.cpus_per_node is None or description.memory_gib is None:
        runs = runs_of(config, overrides, campaign=command == "campaign", allow_code=allow_code)
        description = description.sized_for(runs)
    assert description.memory_gib is not None
    environment = _environment()
    given = {
        **description.model_dump(),
        "shared_memory_gib": description.shared_memory_gib or max(description.memory_gib // 4, 1),
        "config": config,
        "config_path": config,
        "mounted": {},
        "stop_grace_s": stop_grace_of(config, overrides, campaign=command == "campaign"),
        "stop_margin_s": STOP_SECONDS,
        "overrides": list(overrides),
        "command": f"mgpp {command}{f' {OPTION}' if allow_code else ''}",
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
    problems = token_problems(config, files)
    if problems:
        raise ConfigError(problems)
    return files


def _campaign_problems(config: str, overrides: Sequence[str]) -> list[Problem]:
    from pipeline.campaigns.grid import read_campaign

    try:
        read_campaign(config, overrides)
    except ConfigError as error:
        return error.problems
    return []


def _environment() -> jinja2.Environment:
    # Nothing here is HTML: strings go into YAML by `tojson`, into shell by `sh`.
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.PackageLoader("launch.cluster"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON is YAML; Jinja's own filter escapes it for HTML.
    environment.filters["tojson"] = _as_yaml
    environment.filters["sh"] = shlex.quote
    return environment


def _as_yaml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
