"""The whole configuration of a run: sections composed, read from YAML, overridden, checked at once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator
from yaml import YAMLError

from pipeline.data.stage import AnyDataConfig
from pipeline.errors import ConfigError, Problem, SettingError
from pipeline.evaluation.evaluate import EvaluateConfig
from pipeline.export.checkpoint import ExportConfig
from pipeline.models.source import ModelConfig
from pipeline.pruning.config import PruneSection
from pipeline.runs.foreign_code import OPTION, foreign_code
from pipeline.runs.plain_yaml import DEEPEST, check_references, check_yaml, read_yaml
from pipeline.section import Duration, NotNegative, Positive, Section, sections_in
from pipeline.store.locations import is_file
from pipeline.tasks import AnyTaskConfig
from pipeline.training.config import TrainConfig
from pipeline.training.deepspeed import ZeroConfig
from pipeline.training.distill import DistillConfig

_Kind = TypeVar("_Kind", bound=Section)
_FOREIGN = "no configuration of mgpp"
_LONGEST_CHAIN = 32
_OF_SHARES = {("lt", 1), ("le", 1)}  # limits of numbers that may have been meant in percent
# Keys that say which kind of section theirs is.
_TAGS = ("data.source", "task.type", "prune.method.name")
# A revision is one of what is named beside it.
_REVISED = {
    "model.revision": "model.path",
    "data.revision": "data.path",
    "distill.revision": "distill.teacher",
}
# Keys of earlier versions, and what they are called now.
RENAMED = {
    "prune.start": "prune.start_from",
    "prune.warmup": "prune.start_after",
    "prune.method.pattern": "prune.pattern",
    "train.lr_warmup": "train.lr_warmup_length",
    "zero.grad_accum_dtype": "zero.gradients",
}


# pydantic's kinds of errors, where its own message speaks of Python and not of the file.
_MESSAGES = {
    "model_type": "must be a mapping of settings",
    "model_attributes_type": "must be a mapping of settings",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_long": "must have at most {max_length} characters",
}
_NUMBERS = ("int_type", "float_type")
_OF_A_KEY = ".[key]"  # where pydantic places what is wrong with a mapping's key


class DenseConfig(Section):
    """The dense fine-tune that the pruned model is held against; what is null is as in `train`."""

    enabled: bool = True
    """Whether to run it."""
    length: Duration | None = None
    """Its length."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Its peak learning rate."""

    def train_config(self, train: TrainConfig) -> TrainConfig:
        """Return the training section with this one's changes."""
        changes = {"length": self.length, "lr": self.lr}
        return train.model_copy(update={k: v for k, v in changes.items() if v is not None})


def _at_most_one(given: Any) -> Any:
    if isinstance(given, int) and given > 1:
        raise SettingError(Problem("", got=given, hint="a worker drives one GPU, use more workers"))
    return given


class ClusterConfig(Section):
    """Where the run takes place and how many workers train."""

    address: str | None = None
    """Ray cluster to join ("auto", "ray://host:10001", "host:6379"); null starts one here."""
    num_workers: Positive = 1
    """Workers of a training or evaluation."""
    cpus_per_worker: Positive = 1
    """CPU cores of each worker."""
    gpus_per_worker: Annotated[Literal["auto", 0, 1], BeforeValidator(_at_most_one)] = "auto"
    """GPUs of each worker: 0, 1, or auto: 1 where the cluster has one for every worker."""
    placement: Literal["PACK", "SPREAD"] = "PACK"
    """Workers on as few nodes as possible, or over many."""
    max_failures: NotNegative = 3
    """How often a worker group is restarted from its last checkpoint."""
    min_workers: Positive | None = None
    """Fewest workers to resume with from the last checkpoint if some are lost for good; null for all."""
    wait_seconds: Positive = 300
    """How long workers are waited for: at the start, and after some were lost."""
    timeout_seconds: Positive = 1800
    """How long a collective, or the storage of one worker while the others wait for it, may hang before
    the worker group is taken for dead."""
    stop_grace_s: NotNegative = 120
    """How long a run that is asked to stop may take to finish the step under way and save it; 0 ends it
    at once."""

    @property
    def gpus(self) -> int:
        """GPUs of each worker, once what `auto` comes to is known."""
        assert self.gpus_per_worker != "auto", "not settled: see pipeline.runs.hardware"
        return self.gpus_per_worker

    @model_validator(mode="after")
    def _check(self) -> "ClusterConfig":
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise SettingError(
                Problem(
                    "min_workers",
                    got=self.min_workers,
                    hint=f"there are {self.num_workers} workers at most",
                )
            )
        return self


class RunConfig(Section):
    """One run: config -> data -> dense -> prune -> evaluate -> export -> report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run, in reports and model cards."""
    storage: str = "runs"
    """Where artifacts go: a folder, or an fsspec URL (s3://, gs://)."""
    model: ModelConfig
    """The pretrained model."""
    task: AnyTaskConfig
    """What it is fine-tuned and scored on."""
    data: AnyDataConfig
    """Where the rows come from."""
    train: TrainConfig = TrainConfig()
    """How it is fine-tuned."""
    dense: DenseConfig = DenseConfig()
    """The dense baseline."""
    prune: PruneSection
    """How it is pruned."""
    distill: DistillConfig | None = None
    """What it learns from a dense teacher meanwhile; null for nothing."""
    zero: ZeroConfig = ZeroConfig()
    """How state is sharded."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How models are scored."""
    export: ExportConfig = ExportConfig()
    """How the pruned model is written."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and where they are."""

    def to_yaml(self) -> str:
        """Return the configuration as YAML, defaults included."""
        return str(OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json"))))


def read_config(
    path: str, overrides: Sequence[str] = (), kind: type[Section] | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """Read a YAML file and apply `key=value` overrides; return the values and the problems found.

    A file may give only what differs from another one: `extends: path`, relative to itself.

    Args:
        path: of the file. It, and those it extends, may be anyone's: no problem prints a line of one.
        overrides: changes to it.
        kind: what the file is; a run's configuration unless given.
    """
    problems = [problem for override in overrides for problem in _override_problems(override)]
    if problems and is_file(path):
        return {}, problems
    try:
        loaded = _load(Path(path), kind)
        merged = _merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        check_references(OmegaConf.to_container(merged, resolve=False))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except ConfigError as error:
        return {}, error.problems
    except SettingError as error:
        return {}, [error.problem.within(path)]
    except RecursionError:
        return {}, [Problem(path, "its values nest too deeply")]
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        return {}, [_not_yaml(path, error)]
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, []


def read_as(kind: type[_Kind], path: str, overrides: Sequence[str] = ()) -> _Kind:
    """Read a YAML file that is one section from top to bottom, with `key=value` overrides.

    Raises:
        ConfigError: with every problem found.
    """
    values, problems = read_config(path, overrides, kind)
    if problems:
        raise ConfigError(problems)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            _describe(kind, item) if item["loc"] else problem_of(item, whole=path)
            for item in error.errors()
        ) from None


def _load(path: Path, kind: type[Section] | None, below: tuple[Path, ...] = ()) -> DictConfig:
    """Return a file's values over those of the file it extends.

    Args:
        path: the file.
        kind: what it is; a run's configuration unless given.
        below: the files that extend it, the first one first.

    Raises:
        ConfigError: if a file is not there or not YAML, or the files extend each other in a circle.
    """
    named = f"{below[-1]}: extends: {path}" if below else str(path)
    if not is_file(path):
        raise ConfigError([Problem(named, "no such file")])
    chain = (*below, path)
    if len(chain) > _LONGEST_CHAIN:
        raise ConfigError([Problem(named, f"more than {_LONGEST_CHAIN} files extend each other")])
    if path.resolve() in {file.resolve() for file in below}:
        circle = " -> ".join(str(file) for file in chain)
        raise ConfigError([Problem(named, f"extends itself ({circle})")])
    loaded = own_values(path)
    known = {*(kind or RunConfig).model_fields, "extends"}
    if loaded and not known & set(loaded):
        why = f"{_FOREIGN}: it has none of the keys that one has"
        raise ConfigError([Problem(named, why, allowed=tuple(sorted(known)))])
    if "extends" not in loaded:
        return loaded
    base = dict(loaded.items_ex(resolve=False)).get("extends")
    del loaded["extends"]
    if not isinstance(base, str) or "${" in base:
        raise ConfigError([Problem("extends", "must be the path of one file", where=str(path))])
    return _merge(_load(path.parent / base, kind, chain), loaded)


def own_values(path: Path) -> DictConfig:
    """Return what a configuration file itself holds, references as they are.

    Raises:
        ConfigError: if it is no configuration; nothing of what it holds is said.
    """
    try:
        loaded = read_yaml(path)
        check_references(OmegaConf.to_container(loaded, resolve=False))
    except SettingError as error:
        raise ConfigError([error.problem.within(str(path))]) from None
    except (ValueError, OSError) as error:
        why = (error.strerror or "") if isinstance(error, OSError) else str(error)
        raise ConfigError([Problem(str(path), f"{_FOREIGN}: {why}")]) from None
    if not isinstance(loaded, DictConfig):
        why = f"{_FOREIGN}: must be a mapping of sections, got a list"
        raise ConfigError([Problem(str(path), why)])
    return loaded


def _merge(under: DictConfig, over: DictConfig) -> DictConfig:
    """Return values with others over them."""
    for tag in _TAGS:
        chosen, before = (_at(values, tag) for values in (over, under))
        if chosen is not None and before is not None and chosen != before:
            # Another kind of section: the settings of the one below are none of its own.
            OmegaConf.update(under, tag.rpartition(".")[0], {}, merge=False)
    for revision, name in _REVISED.items():
        chosen, before = (_at(values, name) for values in (over, under))
        if chosen not in (None, before) and _at(under, revision) is not None:
            OmegaConf.update(under, revision, None)
    pair = (OmegaConf.to_container(values, resolve=False) for values in (under, over))
    merged = OmegaConf.create(_merged(*pair))
    assert isinstance(merged, DictConfig)
    return merged


def _merged(under: Any, over: Any) -> Any:
    """Return plain values with others over them; what is no mapping is replaced whole."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: _merged(under.get(key), value) for key, value in over.items()}


def _at(values: DictConfig, key: str) -> Any:
    """Return a value, or None where there is none: what stands there may be of any kind."""
    try:
        return OmegaConf.select(values, key)
    except OmegaConfBaseException:
        return None


def _not_yaml(path: Path | str, error: Exception) -> Problem:
    if isinstance(error, OmegaConfBaseException):
        key = error.full_key or ""
        return Problem(key or str(path), yaml_text(error), where=str(path) if key else "")
    return Problem(str(path), yaml_text(error))


def yaml_text(error: Exception) -> str:
    """Return in one line what is wrong with YAML."""
    if isinstance(error, OmegaConfBaseException):
        return str(error).splitlines()[0]  # the others are OmegaConf's own view of the place
    text = " ".join(str(error).split())
    return text if type(error) is ValueError else f"not valid YAML: {text}"


def _override_problems(override: str) -> list[Problem]:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > DEEPEST or set("[]") & set(key):
        return [Problem(repr(override), "an override is key=value, such as train.lr=1e-4")]
    try:
        check_yaml(value)
        given = OmegaConf.from_dotlist([override])
        check_references(OmegaConf.to_container(given, resolve=False))
    except SettingError as error:
        return [replace(error.problem, key=repr(override))]
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, KeyError) as error:
        return [Problem(repr(override), yaml_text(error))]
    return []


def parse_sections(values: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Parse each section by itself, so that one section's mistakes do not hide another's.

    Returns:
        The sections that are right, by name, and a problem for each thing that is wrong.
    """
    sections: dict[str, Any] = {}
    problems = [_unknown_section(key) for key in sorted(set(values) - set(RunConfig.model_fields))]
    for name, spec in RunConfig.model_fields.items():
        if name not in values:
            if spec.is_required():
                problems.append(Problem(name, "missing", hint=spec.description or ""))
            else:
                sections[name] = spec.default
            continue
        try:
            sections[name] = _reader(name).validate_python(values[name])
        except ValidationError as error:
            problems += [_describe(RunConfig, item, name) for item in error.errors()]
    return sections, problems


def _unknown_section(key: str) -> Problem:
    if key == "allow_code":
        return Problem(key, f"is the option {OPTION} of a command, and no key", hint="leave it out")
    return Problem(key, "unknown key", allowed=tuple(RunConfig.model_fields))


@cache
def _reader(section: str) -> TypeAdapter[Any]:
    spec = RunConfig.model_fields[section]
    return TypeAdapter(_annotate(spec.annotation, *spec.metadata, discriminator=spec.discriminator))


def parse_config(values: dict[str, Any], *, allow_code: bool = False) -> RunConfig:
    """Return the configuration, or raise with all that is wrong in its own terms.

    Args:
        values: as `read_config` returns them.
        allow_code: whether it may name code from outside of mgpp.

    Raises:
        ConfigError: with every problem found.
    """
    sections, problems = parse_sections(values)
    problems += [] if allow_code else foreign_code(sections)
    if problems:
        raise ConfigError(problems)
    return RunConfig(**sections)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    extends = "Path of a file, relative to this one, of which this one gives only what differs."
    schema["properties"]["extends"] = {"type": "string", "description": extends}
    # What is required may stand in that other file.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mgpp run configuration",
        **schema,
    }


def _annotate(annotation: Any, *metadata: Any, discriminator: Any) -> Any:
    marks = [*metadata, *([Field(discriminator=discriminator)] if discriminator else [])]
    for mark in marks:
        annotation = Annotated[annotation, mark]
    return annotation


def _describe(model: Any, item: Any, *above: str) -> Problem:
    """Return pydantic's error in the file's own terms: the key, what was got, what is allowed.

    Args:
        model: class of the file.
        item: pydantic's own description.
        *above: the keys above what pydantic was given.
    """
    path: list[str] = []
    for part in [*above, *map(str, item["loc"])]:
        # pydantic puts the tag of a chosen union member into the location; it is no key of the file.
        member = _member(model, part)
        if member is not None:
            model = member
            continue
        path.append(part)
        inner = sections_in(model.model_fields[part].annotation) if part in _fields(model) else []
        model = inner[0] if len(inner) == 1 else inner or model
    key = ".".join(path)
    if item["type"] == "extra_forbidden" and key in RENAMED:
        return Problem(key, f"renamed to {RENAMED[key]}")
    if item["type"] == "extra_forbidden":
        return Problem(key, "unknown key", allowed=tuple(_fields(model)))
    if item["type"] == "missing":
        return Problem(key, "missing")
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = item["ctx"]["discriminator"].strip("'")
        got = item["input"].get(tag) if isinstance(item["input"], dict) else item["input"]
        names = [get_args(member.model_fields[tag].annotation)[0] for member in model]
        return Problem(f"{key}.{tag}", got=got, allowed=tuple(map(repr, names)))
    return problem_of({**item, "loc": path})


def problem_of(item: Any, *, whole: str = "") -> Problem:
    """Return one of pydantic's errors as a problem.

    Args:
        item: of `ValidationError.errors()`.
        whole: names what was read, for what is wrong with no single key of it.
    """
    key = ".".join(str(part) for part in item["loc"])
    error = item.get("ctx", {}).get("error")
    if isinstance(error, SettingError):
        inner = error.problem
        return replace(inner, key=".".join(filter(None, [key, inner.key])))
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in _MESSAGES:
        message = _MESSAGES[item["type"]].format(**item.get("ctx", {}))
    got: Any = ... if isinstance(item["input"], dict) else item["input"]
    is_key = key.endswith(_OF_A_KEY)
    hint = ""
    if item["type"] in _NUMBERS and isinstance(got, str):
        hint = "a number in quotes is text" if _is_number(got) else _as_share(got)
    elif _OF_SHARES & item.get("ctx", {}).items() and 2 <= got <= 100:
        hint = f"it is a share: {_as_share(f'{got:g}%')}"
    return Problem(
        (key.removesuffix(f".{got}{_OF_A_KEY}") if is_key else key) or whole,
        f"{'a key of it: ' if is_key else ''}{message[0].lower()}{message[1:]}",
        got=got,
        hint=hint,
    )


def _as_share(text: str) -> str:
    """Return how a number in percent is written; nothing if it is none."""
    number = text.removesuffix("%").strip()
    is_share = text.endswith("%") and _is_number(number) and isfinite(float(number))
    return f"{text} is {float(number) / 100:g}" if is_share else ""


def _is_number(text: str) -> bool:
    try:
        return text.isascii() and float(text) is not None
    except ValueError:
        return False


def _member(model: Any, part: str) -> Any:
    """Return the member of a union that a tag names."""
    if not isinstance(model, list):
        return None
    for member in model:
        for spec in member.model_fields.values():
            if get_origin(spec.annotation) is Literal and get_args(spec.annotation) == (part,):
                return member
    return None


def _fields(model: Any) -> list[str]:
    return [] if isinstance(model, list) else list(model.model_fields)
