"""What a cluster is to be, whatever starts it; what may stand in the files that do."""

import re
import subprocess
import unicodedata
from collections.abc import Sequence
from shutil import which
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from launch.cluster.node_sizes import planned_cores, planned_memory_gib
from pipeline.errors import ConfigError, Problem, SettingError
from pipeline.runs.config import RunConfig, problem_of, yaml_text
from pipeline.runs.plain_yaml import check_yaml
from pipeline.section import NotNegative, Positive, Section

# Control characters, halves of pairs, what Unicode takes for the end of a line.
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}
_NO_YAML = "\ufeff\ufffe\uffff"
_SHELL_SECONDS = 10.0


def line_fault(text: str, *, several: bool = False) -> str:
    """Return why a text cannot stand in a file that is rendered; nothing if it can.

    Args:
        text: a value that somebody gives.
        several: whether it may have several lines, with tabs.
    """
    whole = text.replace("\n", "").replace("\t", "") if several else text
    if all(unicodedata.category(c) not in _NO_TEXT and c not in _NO_YAML for c in whole):
        return ""
    return f"must be {'text' if several else 'one line'} without control characters"


def _form(pattern: str, what: str) -> AfterValidator:
    """Return a check that a whole text has a form; what stands in files unquoted has a narrow one."""
    has_form = re.compile(pattern, re.ASCII).fullmatch

    def check(text: str) -> str:
        if not has_form(text):
            raise ValueError(f"must be {what}")
        return text

    return AfterValidator(check)


def _script(text: str) -> str:
    fault = line_fault(text, several=True)
    if not fault and not text.strip():
        fault = "must be a shell command"
    if not fault and text.rstrip("\n").endswith("\\"):
        fault = "must not end with a backslash, which joins it to what follows"
    if fault:
        raise ValueError(fault)
    return text


_Name = Annotated[
    str,
    _form(r"[A-Za-z0-9_][\w.-]*", "letters, digits, '.', '_' and '-', with no '.' or '-' first"),
]
_Host = Annotated[str, _form(r"[A-Za-z0-9:][\w.:-]*", "a host name or an address")]
_Image = Annotated[str, _form(r"[A-Za-z0-9][\w./:@-]*", "an image's name, such as registry/mgpp:1")]
_Claim = Annotated[
    str,
    _form(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "lower-case letters, digits, '.' and '-'"),
]
_Partitions = Annotated[
    str,
    _form(
        r"\w[\w.+-]*(,\w[\w.+-]*)*", "names of partitions, of letters, digits, '.', '_', '+', '-'"
    ),
]
_Script = Annotated[str, AfterValidator(_script)]


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
    image: _Image | None = None
    """Container image with mgpp in it; needed for kuberay."""
    install: _Script = "pip install 'mgpp[pipeline]'"
    """Shell command that installs mgpp, where there is no image."""
    retries: NotNegative = 3
    """How often a job is tried again."""
    elastic: bool = False
    """kuberay: whether workers are started only as a run asks for them."""
    claim: _Claim | None = None
    """kuberay: the persistent volume claim that is mounted at the run's `storage`."""
    provider: Literal["aws", "local"] = "aws"
    """ray-up: where machines come from."""
    region: _Name = "us-west-2"
    """ray-up on aws."""
    instance_type: _Name | None = None
    """ray-up on aws: such as p5.48xlarge; needed there."""
    head_ip: _Host | None = None
    """ray-up on local machines: of the head; needed there."""
    worker_ips: list[_Host] = []
    """ray-up on local machines: of the others."""
    ssh_user: _Name = "ubuntu"
    """ray-up."""
    gpu_type: _Name | None = None
    """skypilot: such as H100; needed where there are GPUs."""
    partition: _Partitions | None = None
    """slurm."""
    time_limit: str = Field(default="24:00:00", pattern=r"^[0-9:-]+$")
    """slurm."""
    setup: _Script | None = None
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
        """Return what a target needs and was not given, and which shell commands are none."""
        problems = [
            Problem(f"--set {key}", fault)
            for key in ("install", "setup")
            if (script := getattr(self, key)) and (fault := _shell_fault(script))
        ]
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


def _shell_fault(script: str) -> str:
    """Return why lines of shell are not whole by themselves: the shell parses them, and runs nothing."""
    shell = which("bash")
    if shell is None:
        return "cannot be checked: there is no bash on this machine"
    try:
        done = subprocess.run(  # noqa: S603  # -n: it is parsed alone
            [shell, "-n"],
            input=f"{script}\n",
            env={},  # BASH_ENV names a file that bash runs
            capture_output=True,
            encoding="utf-8",
            timeout=_SHELL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "bash takes too long to parse it"
    # Of a here-document without an end, which would hold the rest of the file, bash warns alone.
    if not done.returncode and not done.stderr:
        return ""
    return f"bash cannot parse it: {' '.join(done.stderr.split())}"
