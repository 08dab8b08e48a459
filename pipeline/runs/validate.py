"""All that can be found wrong with a configuration before anything is started or written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import DatasetDict
from torch import nn

from mgpp import transposed_weights
from pipeline.data.stage import is_local, load_splits, missing_columns
from pipeline.data.unknown_tokens import unknown_problems
from pipeline.errors import ConfigError, Problem
from pipeline.export.onnx import ONNX, onnx_problems
from pipeline.models.checkpoint_check import check_weights, has_head
from pipeline.models.labels import label_order, names_of
from pipeline.models.loading import load_tokenizer
from pipeline.models.passed_over import passed_over_problems
from pipeline.models.settings import build_empty, load_model_config
from pipeline.models.trial import Behaviour, behaviour_of
from pipeline.pruning.one_shot import calibration_problems, prunable_layers
from pipeline.runs.config import RunConfig, parse_sections, read_config
from pipeline.runs.fit import fit_problems, unreached_problems, zeros_problems
from pipeline.runs.flow import pinned
from pipeline.runs.foreign_code import foreign_code, name_problems
from pipeline.runs.hardware import AUTO, Capacity
from pipeline.runs.upstream import resolve_upstream
from pipeline.tasks import Task, make_task
from pipeline.tasks.row_mapper import RowMapper, num_processes
from pipeline.training.deepspeed import problems_of
from pipeline.training.distill import DENSE
from pipeline.training.engine import freeze
from pipeline.training.teacher import teacher_problems

_MANY_STEPS = 10**6
_COUNTED_BYTES = 64 << 20  # of rows that are tokenized only to count examples


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration in which nothing wrong was found.

    Attributes:
        config: the run, with the commits of what it takes from the hub.
        unchecked: code from outside of mgpp that was not run, so that what it gives was not checked.
    """

    config: RunConfig
    unchecked: tuple[Problem, ...]


def validate(
    path: str, overrides: Sequence[str], capacity: Capacity | None, *, allow_code: bool = False
) -> RunConfig:
    """Read, parse and check a configuration file that is to be run.

    Args:
        path: the YAML file.
        overrides: `key=value` changes.
        capacity: what the cluster has, or None if that is not to be checked.
        allow_code: whether it may name code from outside of mgpp, which is run then.

    Returns:
        The run, with the commits of what it takes from the hub.

    Raises:
        ConfigError: with every problem found, in the file's own terms.
    """
    checked = look_through(path, overrides, capacity, allow_code=allow_code)
    if checked.unchecked:
        raise ConfigError(checked.unchecked)
    return checked.config


def look_through(
    path: str, overrides: Sequence[str], capacity: Capacity | None, *, allow_code: bool = False
) -> Checked:
    """Read, parse and check a configuration file; without permission run nothing that it names.

    Arguments and errors are those of `validate`, but code that may not run is none: a function's name is
    looked up in its file, and what only running the code would show is left out.
    """
    values, problems = read_config(path, overrides)
    if problems:
        raise ConfigError(problems)
    values, unresolved = resolve_upstream(values, allow_code=allow_code)
    given, problems = parse_sections(values)
    unchecked = () if allow_code else tuple(foreign_code(given))
    sections = {n: s for n, s in given.items() if n not in _sections_of(unchecked)}
    problems += name_problems(given) if unchecked else []
    if unresolved:
        sections.pop("model", None)
        problems += unresolved
    splits, of_data = read_data(sections)
    of_model = _model_problems(sections, splits)
    of_training = _training_problems(sections)
    problems += [*of_model, *of_data, *of_training]
    if not (of_model or of_data or of_training):
        problems += (
            _text_problems(sections, splits)
            or _label_problems(sections, splits)
            or _length_problems(sections, splits)
        )
    if "cluster" in sections and capacity is not None:
        problems += cluster_problems(sections["cluster"], capacity)
    if "data" in sections and capacity is not None:
        problems += core_problems(sections["data"], capacity)
    if problems:
        raise ConfigError(problems)
    return Checked(config=pinned(RunConfig(**given)), unchecked=unchecked)


def _sections_of(problems: Sequence[Problem]) -> set[str]:
    return {problem.key.partition(".")[0] for problem in problems}


def check_schedule(config: RunConfig, num_rows: int) -> None:
    """Check what depends on the number of training rows, once it is known.

    Raises:
        ConfigError: if the rows do not fill a batch, or prune_start is not before prune_end.
    """
    problems = _schedule_problems(
        config.train, config.dense, config.prune, config.cluster.num_workers, num_rows
    )
    if problems:
        raise ConfigError(problems)


def _model_problems(sections: dict[str, Any], splits: DatasetDict | None) -> list[Problem]:
    if "model" not in sections:
        return []
    model, task, prune = sections["model"], sections.get("task"), sections.get("prune")
    distill = sections.get("distill")
    problems = []
    try:
        tokenizer = load_tokenizer(model)
        load_model_config(model)
    except ConfigError as error:
        return error.problems
    if task is None:
        return []
    auto_model = make_task(task).auto_model
    try:
        empty = build_empty(model, auto_model)
        # What a one-shot method prunes is not trained before, unless it starts from the dense model.
        untrained = (
            prune is not None
            and prune.one_shot is not None
            and prune.start_from == "pretrained"
            and auto_model == "AutoModelForCausalLM"  # others are refused for that
        )
        check_weights(
            model,
            auto_model,
            {} if splits is None else make_task(task).model_kwargs(splits),
            new_head=not untrained,
            sharded="zero" in sections and sections["zero"].stage == 3 and _trains(sections),
        )
    except ConfigError as error:
        return error.problems
    behaviour = behaviour_of(
        load_model_config(model),
        auto_model,
        max_length=task.max_length,
        trust_remote_code=model.trust_remote_code,
    )
    problems += fit_problems(empty, tokenizer, task, behaviour)
    if "export" in sections and ONNX in sections["export"].format:
        problems += onnx_problems(
            load_model_config(model),
            auto_model,
            task.type,
            names=tokenizer.model_input_names,
            trust_remote_code=model.trust_remote_code,
        )
    if "train" in sections:
        problems += _frozen_problems(empty, sections["train"].freeze)
    if {"zero", "cluster"} <= set(sections) and _trains(sections):
        stage, num_workers = sections["zero"].stage, sections["cluster"].num_workers
        problems += passed_over_problems(empty, stage, num_workers)
    if prune is not None:
        of_selection = _selection_problems(prune, make_task(task), empty, behaviour)
        problems += of_selection or zeros_problems(model, prune, empty)
    if distill is not None and prune is not None and prune.one_shot is not None:
        problems.append(
            Problem(
                "distill",
                f"means nothing for {prune.method.name}, which trains nothing",
                hint="leave it out",
            )
        )
    elif distill is not None:
        problems += teacher_problems(distill, model, auto_model)
    return problems


def _frozen_problems(empty: nn.Module, patterns: list[str]) -> list[Problem]:
    try:
        freeze(empty, patterns)
    except ValueError as error:
        return [Problem("train.freeze", str(error))]
    if any(parameter.requires_grad for parameter in empty.parameters()):
        return []
    return [Problem("train.freeze", "leaves nothing to train", got=patterns)]


def _selection_problems(
    prune: Any, task: Task, empty: nn.Module, behaviour: Behaviour | None
) -> list[Problem]:
    """Check what is pruned, and where sparsity goes, against the model."""
    try:
        names = prune.settings.select(empty)
    except ValueError as error:
        return [_of_selection(str(error))]
    problems = unreached_problems(names, prune.settings.exclude, behaviour)
    if problems and prune.settings.sparsity is not None:
        return problems
    if prune.one_shot is not None:
        return _one_shot_problems(prune, task, empty, names)
    chosen = set(names)
    frozen = [n for n, p in empty.named_parameters() if n in chosen and not p.requires_grad]
    if frozen and any(parameter.requires_grad for parameter in empty.parameters()):
        return [_frozen(frozen, names)]
    shapes = {name: tuple(p.shape) for name, p in empty.named_parameters() if name in chosen}
    try:
        prune.allocation(shapes, transposed_weights(empty))
    except ValueError as error:
        key, _, why = str(error).partition(": ")
        return [Problem(f"prune.{key}", why)]
    return []


def _one_shot_problems(
    prune: Any, task: Task, empty: nn.Module, names: Sequence[str]
) -> list[Problem]:
    try:
        prunable_layers(empty, task, names, prune.one_shot)
    except ValueError as error:
        return [Problem("prune.method", f"{prune.method.name}: {error}")]
    return []


def _frozen(frozen: Sequence[str], names: Sequence[str]) -> Problem:
    return Problem(
        "train.freeze",
        f"{len(frozen)} of the {len(names)} weights that are pruned are not trained, the first "
        f"{frozen[0]}",
        hint="add the same patterns to prune.exclude, or freeze other weights",
    )


def _of_selection(why: str) -> Problem:
    setting, colon, reason = why.partition(": ")
    if colon and setting in ("pattern", "scope", "min_kept"):
        return Problem(f"prune.{setting}", reason)
    return Problem("prune.exclude" if why.startswith("exclude") else "prune.include", why)


def read_data(sections: dict[str, Any]) -> tuple[DatasetDict | None, list[Problem]]:
    """Return the rows, if reading them takes no download, and what is wrong with them.

    Args:
        sections: of the configuration; without a task, rows are only read.
    """
    if "data" not in sections:
        return None, []
    data = sections["data"]
    task = make_task(sections["task"]) if "task" in sections else None
    try:
        if is_local(data):
            return load_splits(data, task), []
        columns = load_splits(data, streaming=True)
    except ConfigError as error:
        return None, error.problems
    return None, [] if task is None else missing_columns(data, task, columns)


def _training_problems(sections: dict[str, Any]) -> list[Problem]:
    problems = problems_of(sections["zero"]) if "zero" in sections else []
    if "train" not in sections:
        return problems
    train, cluster, prune = sections["train"], sections.get("cluster"), sections.get("prune")
    dense = sections.get("dense")
    if dense is not None and not dense.enabled:
        problems += _missing_dense(prune, sections.get("distill"))
    one_shot = prune.one_shot if prune is not None else None
    if not _trains(sections):
        return problems
    for key, length in (("train", train.length), ("dense", dense.length if dense else None)):
        if length is not None and length.unit == "%":
            problems.append(
                Problem(f"{key}.length", f"{length.text!r} is a share", hint="give steps or epochs")
            )
        elif length is not None and not length.value:
            problems.append(Problem(f"{key}.length", got=length.text, hint="must be above 0"))
    if train.length.unit == "%" or not train.length.value:
        return problems
    if cluster is not None:
        try:
            train.batch_plan(num_rows=train.batch_size, world_size=cluster.num_workers)
        except ValueError as error:
            problems.append(Problem("train.batch_size", f"{error} (cluster.num_workers)"))
    if train.lr_warmup_length.unit in ("%", train.length.unit):  # whatever the number of rows
        problems += _warmup_problems(train, 1 if train.length.unit == "steps" else _MANY_STEPS)
    if prune is not None and one_shot is None:
        problems += _method_problems(train, prune)
    return problems


def _trains(sections: dict[str, Any]) -> bool:
    """Tell whether a run trains: a one-shot method does not, the dense fine-tune before it does."""
    prune, dense = sections.get("prune"), sections.get("dense")
    return prune is None or prune.one_shot is None or dense is None or dense.enabled


def _method_problems(train: Any, prune: Any) -> list[Problem]:
    """Check a method's settings and its schedule against the training's."""
    problems = []
    try:
        prune.settings.build_method(num_examples=1).begin(train.lr)
    except ValueError as error:
        problems.append(Problem("prune.method", f"{error} (train.lr)"))
    # Where all lengths are in one unit, their order does not depend on the number of rows.
    units = _units(train, prune)
    if len(units) == 1:
        per_epoch = 1 if units == {"steps"} else _MANY_STEPS
        try:
            prune.settings.schedule(train.num_steps(per_epoch), per_epoch)
        except ValueError as error:
            problems.append(Problem("prune", str(error)))
    return problems


def _warmup_problems(train: Any, per_epoch: int) -> list[Problem]:
    """Return what is wrong with the warm-up of the rate, given the steps of an epoch."""
    num_steps = train.num_steps(per_epoch)
    warmup = train.lr_warmup_length.steps(steps_per_epoch=per_epoch, num_steps=num_steps)
    if warmup <= num_steps:
        return []
    return [
        Problem(
            "train.lr_warmup_length",
            f"is longer than the run, train.length: {train.length.text}",
            got=train.lr_warmup_length.text,
        )
    ]


def _missing_dense(prune: Any, distill: Any) -> list[Problem]:
    """Return what asks for the dense fine-tune that is not run."""
    problems = []
    if prune is not None and prune.start_from == "dense":
        problems.append(
            Problem(
                "prune.start_from",
                got="dense",
                hint="dense.enabled is false: there is no dense model to start from",
            )
        )
    if distill is not None and distill.teacher == DENSE:
        problems.append(
            Problem(
                "distill.teacher",
                got="dense",
                hint="dense.enabled is false: there is none to learn from: enable it, or name a model "
                "that was fine-tuned for the task",
            )
        )
    return problems


def _text_problems(sections: dict[str, Any], splits: DatasetDict | None) -> list[Problem]:
    """Check that the tokenizer knows the words of the text, where it was read."""
    if not {"model", "task"} <= set(sections) or splits is None:
        return []
    columns = list(make_task(sections["task"]).text_columns().values())
    return unknown_problems(splits["train"], columns, load_tokenizer(sections["model"]))


def _label_problems(sections: dict[str, Any], splits: DatasetDict | None) -> list[Problem]:
    """Check the labels of a head against the data's, where the rows were read."""
    if not {"model", "task"} <= set(sections) or splits is None:
        return []
    model, task = sections["model"], make_task(sections["task"])
    known, wanted = load_model_config(model).id2label, task.label_names(splits)
    if wanted is None:
        return []
    try:
        label_order(names_of(known), wanted)
    except ConfigError as error:
        # Only now are the weights looked at once more: a head that is new has no order of its own.
        has_one = has_head(model, task.auto_model, num_labels=len(wanted))
        return error.problems if has_one else []
    return []


def _length_problems(sections: dict[str, Any], splits: DatasetDict | None) -> list[Problem]:
    """Check lengths against the number of rows, where counting is cheap or nothing else can tell."""
    if not {"model", "task", "data", "train", "dense", "prune", "cluster"} <= set(sections):
        return []
    data, task, train, prune = (sections[name] for name in ("data", "task", "train", "prune"))
    task = make_task(task)
    cheap = splits is not None and task.row_is_example
    if not cheap and len(_units(train, prune)) == 1:
        return []
    try:
        rows = (splits or load_splits(data, task))["train"]
        if not task.row_is_example and rows.data.nbytes > _COUNTED_BYTES:
            return []  # `check_schedule` tells when the data stage has counted
        mapper = RowMapper(num_proc=num_processes(data.num_proc))
        num_rows = task.num_examples(rows, load_tokenizer(sections["model"]), mapper)
    except ConfigError as error:
        return error.problems
    num_workers = sections["cluster"].num_workers
    return _schedule_problems(train, sections["dense"], prune, num_workers, num_rows)


def _schedule_problems(
    train: Any, dense: Any, prune: Any, num_workers: int, num_rows: int
) -> list[Problem]:
    if prune.one_shot is not None:
        problems = calibration_problems(prune.calibration_rows, num_rows)
        if problems or not dense.enabled:
            return problems
    try:
        plan = train.batch_plan(num_rows=num_rows, world_size=num_workers)
    except ValueError as error:
        return [Problem("train.batch_size", str(error))]
    per_epoch, problems = plan.steps_per_epoch, []
    for fine_tune in (train, dense.train_config(train)) if dense.enabled else (train,):
        problems = problems or _warmup_problems(fine_tune, per_epoch)
    lengths = {"train": train.length}
    if dense.enabled and dense.length is not None:
        lengths["dense"] = dense.length
    for key, length in lengths.items():
        if length.steps(steps_per_epoch=per_epoch) < 1:
            problems.append(
                Problem(
                    f"{key}.length",
                    f"{length.text!r} of {per_epoch} steps per epoch is less than one optimizer step",
                )
            )
    if not problems and prune.one_shot is None:
        try:
            prune.settings.schedule(train.num_steps(per_epoch), per_epoch)
        except ValueError as error:
            problems.append(Problem("prune", str(error)))
    return problems


def _units(train: Any, prune: Any) -> set[str]:
    """Return the units of a run's lengths; a share goes with any."""
    lengths = [train.length, prune.start_after, prune.finetune]
    return {length.unit for length in lengths if length.unit != "%" and length.value}


def core_problems(data: Any, capacity: Capacity) -> list[Problem]:
    """Return whether more processes are to tokenize than a node has cores."""
    cores = int(max((cpus for cpus, _ in capacity.nodes), default=0))
    if data.num_proc == AUTO or data.num_proc <= cores:
        return []
    return [
        Problem(
            "data.num_proc",
            f"no node has as many cores; the most are {cores}",
            got=data.num_proc,
            hint="auto takes those that are free",
        )
    ]


def cluster_problems(cluster: Any, capacity: Capacity) -> list[Problem]:
    """Return what is wrong with the workers asked for, given what the cluster has."""
    gpus = 0 if cluster.gpus_per_worker == AUTO else cluster.gpus_per_worker
    fitting = capacity.num_workers(cluster.cpus_per_worker, gpus)
    if fitting >= cluster.num_workers:
        return []
    return [
        Problem(
            "cluster.num_workers",
            f"got {cluster.num_workers} workers of {cluster.cpus_per_worker} CPUs and {gpus} GPUs",
            hint=f"the cluster can hold {fitting} (nodes: {capacity})",
        )
    ]
