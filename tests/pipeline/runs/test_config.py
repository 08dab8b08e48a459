"""A configuration file read, overridden and checked: every problem at once, in the file's terms."""

import copy
import math
import textwrap
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mgpp import METHODS, ONE_SHOT
from pipeline.errors import ConfigError
from pipeline.pruning.config import METHOD_CONFIGS
from pipeline.runs import config as run_config
from pipeline.runs.config import ClusterConfig, RunConfig, json_schema, parse_config, parse_sections
from pipeline.section import Duration
from pipeline.tasks import TASKS

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"
SECTIONS = [
    "name",
    "storage",
    "model",
    "task",
    "data",
    "train",
    "dense",
    "prune",
    "distill",
    "zero",
    "evaluate",
    "export",
    "cluster",
]
SMALL = {
    "name": "small",
    "model": {"path": "somewhere"},
    "task": {"type": "classification", "text": ["text"], "label": "label"},
    "data": {"source": "files", "train": "rows.csv"},
    "prune": {"sparsity": 0.5},
}


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


def changed(**sections):
    return {**SMALL, **sections}


def read_config(path, overrides=()):
    """As the one that is tested, with the problems written out."""
    values, found = run_config.read_config(path, overrides)
    return values, [str(problem) for problem in found]


def problems(values):
    with pytest.raises(ConfigError) as raised:
        parse_config(values)
    assert str(raised.value) == "\n".join(map(str, raised.value.problems))
    return [str(problem) for problem in raised.value.problems]


def only_problem(values):
    (problem,) = problems(values)
    return problem


# Reading a file.


def test_numbers_in_scientific_notation_are_floats(tmp_path):
    path = write(tmp_path, "train: {lr: 1e-4, eps: 1E-8, batch_size: 32}\nname: x\n")
    values, found = read_config(path)
    assert found == []
    assert values == {"train": {"lr": 1e-4, "eps": 1e-8, "batch_size": 32}, "name": "x"}
    assert type(values["train"]["lr"]) is float


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "name: x\ntrain: {lr: 1e-4, batch_size: 32}\n")
    values, found = read_config(
        path, ["train.lr=2e-5", "train.betas=[0.9,0.99]", "name='a=b'", "prune.method.name=gmp"]
    )
    assert found == []
    assert values == {
        "name": "a=b",
        "train": {"lr": 2e-5, "batch_size": 32, "betas": [0.9, 0.99]},
        "prune": {"method": {"name": "gmp"}},
    }


def test_the_last_of_two_overrides_wins(tmp_path):
    path = write(tmp_path, "name: x\n")
    assert read_config(path, ["name=y", "name=z"]) == ({"name": "z"}, [])


def test_interpolations_are_resolved(tmp_path):
    path = write(tmp_path, "name: x\nstorage: runs/${name}\n")
    assert read_config(path)[0]["storage"] == "runs/x"


def test_an_empty_file_holds_no_sections(tmp_path):
    assert read_config(write(tmp_path, "")) == ({}, [])


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_file_is_named(tmp_path, name):
    path = str(tmp_path / name)
    assert read_config(path) == ({}, [f"{path}: no such file"])


@pytest.mark.parametrize("override", ["train.lr", "nonsense", ""])
def test_an_override_without_a_value_is_named(tmp_path, override):
    values, (problem,) = read_config(write(tmp_path, "name: x\n"), ["name=y", override])
    assert values == {}
    assert problem == f"{override!r}: an override is key=value, such as train.lr=1e-4"


@pytest.mark.parametrize("override", ["train.freeze=[1", "train.x={"])
def test_an_override_that_is_no_yaml_is_named(tmp_path, override):
    values, (problem,) = read_config(write(tmp_path, "name: x\n"), [override])
    assert values == {}
    assert override in problem


@pytest.mark.parametrize("override", ["=3", "train..lr=1", ".name=x"])
def test_an_override_without_a_key_is_named(tmp_path, override):
    values, (problem,) = read_config(write(tmp_path, "name: x\n"), [override])
    assert values == {}
    assert override in problem


@pytest.mark.parametrize("text", ["train: [1\n", "a: b: c\n", "name: x\nname: y\n", "name: {x\n"])
def test_bad_yaml_is_named_in_one_line(tmp_path, text):
    path = write(tmp_path, text)
    values, (problem,) = read_config(path)
    assert values == {}
    assert problem.startswith(f"{path}: no configuration of mgpp: line ")
    assert "column" in problem
    assert "\n" not in problem


def test_a_reference_to_nothing_is_named(tmp_path):
    path = write(tmp_path, "name: ${nowhere}\n")
    assert read_config(path) == ({}, [f"{path}: name: Interpolation key 'nowhere' not found"])


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\x80\xff\x00\x01 not text")
    values, (problem,) = read_config(str(path))
    assert values == {}
    assert str(path) in problem


def test_a_list_is_no_mapping(tmp_path):
    path = write(tmp_path, "- train\n- prune\n")
    why = "no configuration of mgpp: must be a mapping of sections, got a list"
    assert read_config(path) == ({}, [f"{path}: {why}"])


# A file that extends another.


def write_files(folder, **texts):
    for name, text in texts.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(folder / f"{next(iter(texts))}.yaml")


def test_a_file_over_another_gives_only_what_differs(tmp_path):
    path = write_files(
        tmp_path / "recipes",
        top="extends: ../middle.yaml\nname: top\nprune: {sparsity: 0.9}\n",
    )
    write_files(
        tmp_path,
        middle="extends: folder/base.yaml\ntrain: {lr: 2e-4}\nstorage: runs/${name}\n",
    )
    write_files(
        tmp_path / "folder",
        base="name: base\ntrain: {lr: 1e-4, batch_size: 8, freeze: [a, b]}\nprune: {sparsity: 0.5}\n",
    )
    values, found = read_config(path, ["train.freeze=[c]"])
    assert found == []
    assert values == {
        "name": "top",
        "storage": "runs/top",
        "train": {"lr": 2e-4, "batch_size": 8, "freeze": ["c"]},
        "prune": {"sparsity": 0.9},
    }


def test_another_kind_of_section_takes_nothing_from_the_file_below(tmp_path):
    path = write_files(
        tmp_path,
        top="extends: base.yaml\ntask: {type: regression, label: score}\ndata: {source: hub}\n",
        base="task: {type: classification, label: label, metric: f1}\n"
        "data: {source: hub, path: glue, name: sst2}\n",
    )
    assert read_config(path)[0] == {
        "task": {"type": "regression", "label": "score"},
        "data": {"source": "hub", "path": "glue", "name": "sst2"},
    }


def test_a_revision_is_of_what_is_named_beside_it(tmp_path):
    commit = "0" * 40
    below = {
        "model": {"path": "org/model", "revision": commit},
        "data": {"source": "hub", "path": "org/rows", "revision": commit, "name": "part"},
        "distill": {"teacher": "org/teacher", "revision": commit},
    }
    (tmp_path / "below.yaml").write_text(yaml.safe_dump(below))
    above = tmp_path / "above.yaml"
    above.write_text("extends: below.yaml\nmodel: {path: org/model, dropout: 0.1}\n")

    def revisions(*overrides):
        values, problems = run_config.read_config(str(above), overrides)
        assert problems == []
        return [values[section].get("revision") for section in below]

    assert revisions() == [commit] * 3
    assert revisions("data.name=other") == [commit] * 3
    assert revisions("model.path=org/other") == [None, commit, commit]
    assert revisions("model.path=org/other", "model.revision=main") == ["main", commit, commit]
    assert revisions("data.path=rows", "distill.teacher=dense") == [commit, None, None]
    assert revisions("data={source: files, train: rows.csv}") == [commit, None, commit]


def test_files_that_cannot_be_extended(tmp_path):
    path = write_files(tmp_path, top="extends: nowhere.yaml\n")
    missing = tmp_path / "nowhere.yaml"
    assert read_config(path) == ({}, [f"{path}: extends: {missing}: no such file"])
    path = write_files(tmp_path, a="extends: b.yaml\n", b="extends: a.yaml\n")
    values, (problem,) = read_config(path)
    assert values == {}
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    assert problem == f"{b}: extends: {a}: extends itself ({a} -> {b} -> {a})"
    path = write_files(tmp_path, a="extends: [b.yaml]\n")
    values, (problem,) = read_config(path)
    assert problem.startswith(f"{path}: extends: must be the path of one file")
    path = write_files(tmp_path, a="extends: b.yaml\n", b="name: {\n")
    values, (problem,) = read_config(path)
    assert problem.startswith(f"{b}: no configuration of mgpp: line 2, column 1: ")


# Parsing the sections.


def test_defaults_fill_what_a_file_leaves_out():
    config = parse_config(SMALL)
    assert config.train.length == Duration("3ep")
    assert config.prune.method == METHOD_CONFIGS["mgpp"](name="mgpp")
    assert config.zero.stage == 2
    assert config.storage == "runs"


def test_no_required_section_given():
    found = problems({})
    assert [line.split(":")[0] for line in found] == ["name", "model", "task", "data", "prune"]
    assert all(": missing; " in line for line in found)
    assert "model: missing; The pretrained model." in found


def test_every_problem_of_a_file_at_once():
    found = problems(
        {
            "name": "not a name",
            "modle": {"path": "somewhere"},
            "task": {"type": "clasification"},
            "data": {"source": "files"},
            "train": {"batch_size": "many", "lr": -1, "lenght": 3},
            "prune": {"sparsity": 1.0, "start_after": "a while"},
            "zero": {"stage": 7},
            "cluster": {"gpus_per_worker": 2},
        }
    )
    assert [line.split(":")[0] for line in found] == [
        "modle",
        "name",
        "model",
        "task.type",
        "data.train",
        "train.lr",
        "train.batch_size",
        "train.lenght",
        "prune.sparsity",
        "prune.start_after",
        "zero.stage",
        "cluster.gpus_per_worker",
    ]


def test_an_unknown_section_lists_the_sections():
    assert (
        only_problem(changed(trian={})) == f"trian: unknown key; allowed are {', '.join(SECTIONS)}"
    )


def test_an_unknown_key_lists_the_keys_of_its_section():
    problem = only_problem(changed(evaluate={"batchsize": 3}))
    assert (
        problem == "evaluate.batchsize: unknown key; allowed are batch_size, batch_tokens, max_rows"
    )


def test_an_unknown_key_of_a_chosen_method_lists_that_methods_keys():
    problem = only_problem(changed(prune={"sparsity": 0.5, "method": {"name": "gmp", "slab": 1}}))
    assert problem == "prune.method.slab: unknown key; allowed are name"
    problem = only_problem(changed(prune={"sparsity": 0.5, "method": {"name": "mgpp", "slab": 1}}))
    assert problem == (
        "prune.method.slab: unknown key; allowed are name, spike_var, spike_threshold, "
        "spike_follows_lr, slab_var, slab_prob, slab_prob_initial_factor, slab_prob_final_factor, "
        "decoupled"
    )


def test_an_unknown_key_of_a_chosen_task_lists_that_tasks_keys():
    task = {"type": "causal-lm", "label": "l"}
    assert only_problem(changed(task=task)) == (
        "task.label: unknown key; allowed are max_length, type, text, end_of_text, metric"
    )


# section, what it holds, key, what was got, what is allowed
WRONG = [
    ("train", {"batch_size": "many"}, "train.batch_size", "got 'many'", "integer"),
    ("train", {"batch_size": 0}, "train.batch_size", "got 0", "greater than or equal to 1"),
    ("train", {"lr": 0}, "train.lr", "got 0", "greater than 0"),
    ("train", {"lr": math.nan}, "train.lr", "got nan", "finite"),
    ("train", {"lr": math.inf}, "train.lr", "got inf", ""),
    ("train", {"betas": [0.9, 1.5]}, "train.betas.1", "got 1.5", "less than 1"),
    ("train", {"length": 2.5}, "train.length", "got 2.5", "steps (500), epochs ('2ep')"),
    ("train", {"freeze": "x"}, "train.freeze", "got 'x'", "list"),
    ("dense", {"enabled": "perhaps"}, "dense.enabled", "got 'perhaps'", "boolean"),
    ("dense", {"lr": -1}, "dense.lr", "got -1", "greater than 0"),
    ("prune", {"sparsity": 1.0}, "prune.sparsity", "got 1.0", "less than 1"),
    ("prune", {"sparsity": -0.1}, "prune.sparsity", "got -0.1", "greater than or equal to 0"),
    ("prune", {"sparsity": math.nan}, "prune.sparsity", "got nan", "finite"),
    ("prune", {"sparsity": 0.5, "interval": 0}, "prune.interval", "got 0", "equal to 1"),
    ("zero", {"stage": 4}, "zero.stage", "got 4", "0, 1, 2 or 3"),
    (
        "zero",
        {"precision": "fp8"},
        "zero.precision",
        "got 'fp8'",
        "'auto', 'fp32', 'tf32', 'bf16' or 'fp16'",
    ),
    ("cluster", {"placement": "NEAR"}, "cluster.placement", "got 'NEAR'", "'PACK' or 'SPREAD'"),
    ("evaluate", {"max_rows": 0}, "evaluate.max_rows", "got 0", "equal to 1"),
    ("export", {"max_shard_size": 5}, "export.max_shard_size", "got 5", "string"),
    ("model", {"path": "m", "dropout": 1.0}, "model.dropout", "got 1.0", "less than 1"),
    (
        "task",
        {"type": "classification", "text": ["a", "b", "c"], "label": "l"},
        "task.text",
        "got ['a', 'b', 'c']",
        "at most 2",
    ),
    ("data", {"source": "function", "function": "f"}, "data.function", "got 'f'", "pattern"),
    ("data", {"source": "files", "train": 3}, "data.train", "got 3", "list"),
    ("data", {"source": "files", "train": ["a.csv", 3]}, "data.train.1", "got 3", "string"),
]


@pytest.mark.parametrize(("section", "values", "key", "got", "allowed"), WRONG)
def test_a_wrong_value_names_the_key_what_was_got_and_what_is_allowed(
    section, values, key, got, allowed
):
    for problem in problems(changed(**{section: values})):
        assert problem.startswith(f"{key}: "), problem
        assert got in problem
        assert allowed in problem


@pytest.mark.parametrize(
    ("section", "value"),
    [
        (section, value)
        for section in SECTIONS[2:]
        for value in (None, 3, [1])
        if (section, value) != ("distill", None)  # which is how it is turned off
    ],
)
def test_a_section_must_be_a_mapping(section, value):
    problem = only_problem(changed(**{section: value}))
    assert problem.startswith(f"{section}: ")
    assert f"got {value!r}" in problem


@pytest.mark.parametrize(
    ("section", "values", "key", "got", "allowed"),
    [
        (
            "task",
            {"type": "qa"},
            "task.type",
            "'qa'",
            list(TASKS),
        ),
        ("task", {}, "task.type", "None", list(TASKS)),
        ("data", {"source": "web"}, "data.source", "'web'", ["files", "hub", "function"]),
        ("data", {"train": "x.csv"}, "data.source", "None", ["files", "hub", "function"]),
        (
            "prune",
            {"sparsity": 0.5, "method": {"name": "obc"}},
            "prune.method.name",
            "'obc'",
            [*METHODS, *ONE_SHOT],
        ),
    ],
)
def test_a_wrong_tag_lists_the_right_ones(section, values, key, got, allowed):
    problem = only_problem(changed(**{section: values}))
    assert problem.startswith(f"{key}: got {got}; allowed are ")
    assert all(name in problem for name in allowed)


def test_initial_sparsity_above_sparsity():
    problem = only_problem(changed(prune={"sparsity": 0.5, "initial_sparsity": 0.6}))
    assert problem == "prune.initial_sparsity: got 0.6, which exceeds sparsity, 0.5"
    parse_config(changed(prune={"sparsity": 0.5, "initial_sparsity": 0.5}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("prune.start", "prune.start_from"),
        ("prune.warmup", "prune.start_after"),
        ("prune.method.pattern", "prune.pattern"),
        ("train.lr_warmup", "train.lr_warmup_length"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_its_new_name(old, new):
    section, *inner, last = old.split(".")
    values = copy.deepcopy(SMALL)
    place = values.setdefault(section, {})
    for key in inner:
        place = place.setdefault(key, {"name": "wanda"})
    place[last] = "2:4"
    assert f"{old}: renamed to {new}" in map(str, parse_sections(values)[1])


def test_sparse_transfer_takes_no_schedule():
    transfer = {"method": {"name": "sparse-transfer"}}
    config = parse_config(changed(prune=transfer))
    assert config.prune.sparsity is None
    assert config.prune.settings.schedule(100, 10).prune_end == -1
    # As settings cross to workers: with all defaults written out.
    assert parse_config(config.model_dump(mode="json")) == config
    for key, value in (
        ("sparsity", 0.5),
        ("start_after", 3),
        ("interval", 2),
        ("start_from", "dense"),
    ):
        problem = only_problem(changed(prune={**transfer, key: value}))
        assert problem.startswith(f"prune.{key}: means nothing for sparse-transfer, which keeps")
    assert only_problem(changed(prune={"method": {"name": "gmp"}})) == "prune.sparsity: missing"


@pytest.mark.parametrize("spike_var", [0.05, 0.1])
def test_the_spike_must_be_narrower_than_the_slab(spike_var):
    method = {"name": "mgpp", "spike_var": spike_var, "slab_var": 0.05}
    problem = only_problem(changed(prune={"sparsity": 0.5, "method": method}))
    assert problem.startswith("prune.method: need 0 < spike_var < slab_var")
    assert f"spike_var={spike_var}" in problem


def test_slab_prob_must_stay_below_one():
    method = {"name": "mgpp", "slab_prob": 0.5, "slab_prob_initial_factor": 2}
    problem = only_problem(changed(prune={"sparsity": 0.5, "method": method}))
    assert problem.startswith("prune.method: slab_prob x initial_factor must lie strictly between")


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (
            {"name": "soft-movement", "score_lr": 0},
            "score_lr: input should be greater than 0, got 0",
        ),
        (
            {"name": "soft-movement", "penalty": -1},
            "penalty: input should be greater than or equal to 0, got -1",
        ),
        ({"name": "pins", "beta2": 1}, "beta2: input should be less than 1, got 1"),
        ({"name": "pins", "beta3": 0.5}, "beta3: unknown key; allowed are name, beta1, beta2"),
    ],
)
def test_a_wrong_setting_of_a_method_is_named(method, problem):
    found = only_problem(changed(prune={"sparsity": 0.5, "method": method}))
    assert found == f"prune.method.{problem}"


def test_a_worker_has_one_gpu_at_most():
    problem = only_problem(changed(cluster={"gpus_per_worker": 2}))
    assert problem.startswith("cluster.gpus_per_worker: got 2; a worker drives one GPU")
    with pytest.raises(ValidationError, match="use more workers"):
        ClusterConfig(gpus_per_worker=2)


def test_a_block_of_one_token_predicts_nothing():
    problem = only_problem(changed(task={"type": "causal-lm", "max_length": 1}))
    assert problem.startswith("task.max_length: ")


def test_the_method_is_chosen_by_its_name():
    config = parse_config(changed(prune={"sparsity": 0.5, "method": {"name": "gmp"}}))
    assert config.prune.method == METHOD_CONFIGS["gmp"](name="gmp")


def test_a_config_is_frozen():
    config = parse_config(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0


def test_the_dense_section_changes_only_what_it_gives():
    config = parse_config(changed(train={"lr": 1e-4, "batch_size": 8}, dense={"length": "1ep"}))
    dense = config.dense.train_config(config.train)
    assert dense.length == Duration("1ep")
    assert dense.model_copy(update={"length": config.train.length}) == config.train
    assert parse_config(SMALL).dense.train_config(config.train) == config.train


# Writing it out, and its schema.


@pytest.mark.parametrize(
    "values",
    [
        SMALL,
        changed(
            train={"length": 500, "lr": 1e-4, "betas": [0.8, 0.9], "freeze": ["*.embeddings.*"]},
            data={"source": "files", "train": ["a.csv"], "options": {"delimiter": "\t"}},
            prune={"sparsity": 0.9, "method": {"name": "gmp"}, "start_after": "2ep", "finetune": 3},
            task={"type": "regression", "text": ["a", "b"], "label": "l", "metric": "mse"},
            zero={"stage": 3, "extra": {"zero_optimization": {"a": 1}}},
            distill={"teacher": "org/teacher", "revision": "main", "weight": 1},
        ),
    ],
)
def test_yaml_of_a_config_reads_back_as_the_same_config(tmp_path, values):
    config = parse_config(values)
    path = write(tmp_path, config.to_yaml())
    read, found = read_config(path)
    assert found == []
    assert parse_config(read) == config
    assert yaml.safe_load(config.to_yaml())["name"] == "small"  # for readers that are not ours


def test_the_demo_parses():
    values, found = read_config(str(DEMO))
    assert found == []
    config = parse_config(values)
    raw = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    assert config.prune.sparsity == raw["prune"]["sparsity"]
    assert config.train.length == Duration(raw["train"]["length"])
    schedule = config.prune.settings.schedule(num_steps=1000, steps_per_epoch=100)
    assert (schedule.prune_start, schedule.prune_end) == (50, 749)  # 5% and 25% in the file


def test_schema_lists_every_section_and_is_a_schema():
    schema = json_schema()
    assert list(schema["properties"]) == [*SECTIONS, "extends"]
    assert list(RunConfig.model_fields) == SECTIONS
    alone, extending = schema["anyOf"]
    assert set(alone["required"]) == {"name", "model", "task", "data", "prune"}
    assert extending["required"] == ["extends"]
    for spec in schema["properties"].values():
        referred = schema["$defs"].get(spec.get("$ref", "").rpartition("/")[2], {})
        assert spec.get("description") or referred["description"]
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)


def test_schema_takes_what_parses_and_refuses_what_does_not():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(SMALL)
    assert validator.is_valid(read_config(str(DEMO))[0])
    assert validator.is_valid(parse_config(SMALL).model_dump(mode="json"))
    assert validator.is_valid({"extends": "base.yaml", "prune": {"sparsity": 0.5}})
    for wrong in (
        changed(trian={}),
        changed(prune={"sparsity": 1.0}),
        changed(prune={"sparsity": 0.5, "method": {"name": "obc"}}),
        changed(train={"length": "3 weeks"}),
        changed(zero={"stage": 4}),
        {},
    ):
        assert not validator.is_valid(wrong), wrong
