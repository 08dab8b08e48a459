"""What is found wrong with a configuration before anything is started or written."""

import itertools
import re
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.weight_files import count_zeros
from pipeline.runs.config import RunConfig
from pipeline.runs.hardware import Capacity
from pipeline.runs.validate import check_schedule, validate
from tests.pipeline.models.word_chains import text
from tests.run_file import write_run
from tests.tiny import write_decoder

pytestmark = pytest.mark.usefixtures("datasets_cache")

TWO_NODES = Capacity(nodes=((4.0, 0.0), (3.0, 0.0)))


@pytest.fixture
def config_file(tmp_path, tiny_bert, words_csv):
    """A valid configuration of a run on the tiny BERT."""
    return write_run(tmp_path, tiny_bert, words_csv)


def problems(path, *overrides, capacity=None):
    with pytest.raises(ConfigError) as raised:
        validate(str(path), overrides, capacity)
    assert not (path.parent / "storage").exists()
    return [str(problem) for problem in raised.value.problems]


def only_problem(path, *overrides, capacity=None):
    (problem,) = problems(path, *overrides, capacity=capacity)
    return problem


def test_a_valid_config_is_returned_and_nothing_is_written(config_file, tiny_bert, words_csv):
    before = sorted(config_file.parent.rglob("*"))
    config = validate(str(config_file), ["train.lr=3e-5"], TWO_NODES)
    assert isinstance(config, RunConfig)
    assert config.train.lr == 3e-5
    assert config.model.path == str(tiny_bert)
    assert config.data.train == [str(words_csv)]
    assert sorted(config_file.parent.rglob("*")) == before


def test_a_missing_file_and_a_bad_override(config_file, tmp_path):
    missing = tmp_path / "missing.yaml"
    assert only_problem(missing) == f"{missing}: no such file"
    assert only_problem(config_file, "train.lr").startswith("'train.lr': an override is key=value")


# The model.


def test_a_missing_model_folder(config_file, tmp_path):
    missing = tmp_path / "nowhere"
    problem = only_problem(config_file, f"model.path={missing}")
    assert problem.startswith(f"model.path: no tokenizer in {str(missing)!r}")


def test_a_missing_package(config_file):
    problem = only_problem(config_file, "model.path=package:no_such_package/model")
    assert problem.startswith("model.path: package:no_such_package/model: ")
    assert "not installed" in problem


def test_an_export_to_onnx_is_for_encoders(config_file):
    asked = "export.format=[plain,onnx]"
    problem = only_problem(config_file, asked, "model.overrides.is_decoder=true")
    assert problem.startswith("export.format: only encoders with a classification or question-")
    assert "export.onnx_int8: got True; add onnx to export.format" in problems(
        config_file, "export.onnx_int8=true"
    )


def test_a_model_folder_without_weights(config_file, tiny_bert, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_bert, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    problem = only_problem(config_file, f"model.path={bare}")
    assert problem.startswith(f"model.path: {str(bare)!r} has no weights")
    assert "model.random_init" in problem
    validate(str(config_file), [f"model.path={bare}", "model.random_init=true"], None)


def test_a_model_folder_without_a_configuration(config_file, tiny_bert, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_bert, bare, ignore=shutil.ignore_patterns("config.json"))
    assert only_problem(config_file, f"model.path={bare}").startswith(f"model.path: {str(bare)!r}")


def test_model_settings_the_architecture_does_not_have(config_file):
    found = problems(config_file, "model.overrides.num_layer=3", "model.overrides.layers=4")
    assert found == [
        "model.overrides.num_layer: bert has no such setting",
        "model.overrides.layers: bert has no such setting",
    ]


def test_model_settings_that_cannot_be_built(config_file):
    problem = only_problem(config_file, "model.overrides.num_attention_heads=3")
    assert problem.startswith("model.path: ")
    assert "cannot be built as a SequenceClassification model" in problem


# What is pruned.


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_no_weight(config_file, kind):
    problem = only_problem(config_file, f"prune.{kind}=['*.nonsense.*']")
    assert problem.startswith(
        f"prune.{kind}: {kind} pattern '*.nonsense.*' matches no parameter; there are: bert."
    )


def test_a_pattern_that_takes_vectors(config_file):
    problem = only_problem(config_file, "prune.include=['*.layer.*']")
    assert problem.startswith("prune.include: the include patterns also take ")
    assert "only matrices are prunable" in problem


def test_nothing_left_to_prune(config_file):
    problem = only_problem(config_file, "prune.exclude=['*']")
    assert "no weight is left to prune" in problem


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["prune.pattern='3:5'"],
            "prune.pattern: bert.encoder.layer.0.attention.self.query.weight",
        ),
        (
            ["prune.pattern='32x1'"],
            "prune.pattern: bert.encoder.layer.0.attention.self.query.weight",
        ),
        (
            ["prune.pattern=2:4"],
            "'prune.pattern=2:4': line 1: 2:4 without quotes is a number in base 60",
        ),
        (["prune.pattern='3:4'"], "prune.sparsity: got 0.5, but pattern 3:4 allows 0.25 at most"),
        (
            ["prune.scope=matrix"],
            "prune.scope: input should be 'global', 'layer', 'uniform' or 'lamp', got 'matrix'",
        ),
        (["prune.min_kept=0.6"], "prune.sparsity: got 0.5, but min_kept 0.6 allows 0.4 at most"),
        (["prune.budgets={'*.quary.*': 0.5}"], "prune.budgets: pattern '*.quary.*' matches no"),
        (
            ["prune.budgets={'*.query.*': 0.5, '*.0.*': 0.1}"],
            "prune.budgets: patterns '*.query.*' and '*.0.*' both match",
        ),
        (
            ["prune.budgets={'*.layer.0.*': 0.0, '*.layer.1.*': 0.1}"],
            "prune.budgets: of 4096 weights",
        ),
    ],
)
def test_sparsity_that_cannot_be_placed_so(config_file, overrides, problem):
    assert only_problem(config_file, *overrides).startswith(problem)


def test_sparsity_placed_otherwise(config_file):
    overrides = [
        'prune.pattern="2:4"',
        "prune.scope=uniform",
        "prune.budgets={'*.query.*': 0.4}",
        "prune.sparsity=0.45",
    ]
    prune = validate(str(config_file), overrides, None).prune
    assert (prune.pattern, prune.budgets) == ("2:4", {"*.query.*": 0.4})


def test_zeros_to_keep_that_the_model_does_not_have(config_file, tiny_bert, tmp_path):
    keep = ("prune.keep_zeros=true", "prune.initial_sparsity=0")
    expected = f"prune.keep_zeros: no prunable weight of '{tiny_bert}' is zero"
    assert only_problem(config_file, *keep).startswith(expected)
    random = only_problem(config_file, *keep, "model.random_init=true")
    assert "there are no zeros to keep" in random
    folder = shutil.copytree(tiny_bert, tmp_path / "pruned")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n, w in weights.items() if ".layer." in n and w.dim() == 2)
    weights[name][0, 0] = 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = validate(str(config_file), [*keep, f"model.path={folder}"], None)
    assert config.prune.settings.keep_zeros


def test_more_zeros_than_the_sparsity_asked_for_are_refused(config_file, tmp_path, tiny_bert):
    keep = ("prune.keep_zeros=true", "prune.initial_sparsity=0")
    folder = shutil.copytree(tiny_bert, tmp_path / "pruned")
    weights = load_file(folder / "model.safetensors")
    prunable = [n for n, w in weights.items() if ".layer." in n and w.dim() == 2]
    for name in prunable:
        weights[name][: len(weights[name]) // 2] = 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    zeros = sum(int((weights[name] == 0).sum()) for name in prunable)
    numel = sum(weights[name].numel() for name in prunable)
    settings = (*keep, f"model.path={folder}")
    problem = only_problem(config_file, *settings, "prune.sparsity=0.4")
    assert problem.startswith(f"prune.sparsity: {zeros:,} of the {numel:,} prunable weights of ")
    assert "(50.00%), and prune.keep_zeros keeps them, got 0.4; ask for more" in problem
    validate(str(config_file), [*settings, "prune.sparsity=0.5"], None)


def test_zeros_of_files_are_not_counted_where_these_do_not_tell(tmp_path):
    names = ["layer.0.weight", "layer.1.weight"]
    dense = {f"bert.{name}": torch.ones(2, 2) for name in names}
    save_file(dense, tmp_path / "model.safetensors")
    assert count_zeros(tmp_path, names) == 0
    assert count_zeros(tmp_path, [f"model.bert.{name}" for name in names]) == 0
    # What is not there is not known.
    assert count_zeros(tmp_path, [*names, "layer.2.weight"]) is None
    save_file({**dense, f"bert.{names[0]}": torch.ones(3)}, tmp_path / "model.safetensors")
    assert count_zeros(tmp_path, names) is None  # packed: its zeros are not written
    (tmp_path / "model.safetensors").unlink()
    torch.save(dense, tmp_path / "pytorch_model.bin")
    assert count_zeros(tmp_path, names) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_zeros_of_narrow_types_are_counted(tmp_path, dtype):
    weights = torch.tensor([[1.0, 2.0], [0.0, -0.0]])
    save_file({"a.weight": weights.to(dtype)}, tmp_path / "model.safetensors")
    assert count_zeros(tmp_path, ["a.weight"]) == 2


def test_zeros_to_keep_of_a_dense_fine_tune(config_file):
    problem = only_problem(config_file, "prune.keep_zeros=true", "prune.start_from=dense")
    assert problem.startswith("prune.keep_zeros: the dense fine-tune")


def test_a_pattern_that_freezes_nothing(config_file):
    problem = only_problem(config_file, "train.freeze=['*.nonsense.*']")
    assert problem.startswith("train.freeze: ")
    assert "'*.nonsense.*'" in problem


# The data.


def test_a_label_column_that_is_not_in_the_data(config_file):
    problem = only_problem(config_file, "task.label=sentiment")
    assert problem == (
        "task.label: column 'sentiment' is not in the train data; there are: ['label', 'text']"
    )


def test_every_column_that_is_not_in_the_data(config_file):
    found = problems(config_file, "task.label=sentiment", "task.text=[first,second]")
    assert [line.split(":")[0] for line in found] == ["task.text.0", "task.text.1", "task.label"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("text,label\n" + "a good day,0\na bad day,-1\na day,1\n" * 8, "has -1, which marks rows"),
        ("text,label\n" + "a good day,1\n" * 8, "needs at least two labels"),
    ],
)
def test_rows_that_cannot_be_learned_from(config_file, tmp_path, rows, problem):
    (tmp_path / "bad.csv").write_text(rows)
    before = set(tmp_path.iterdir())
    (found,) = problems(config_file, f"data.train={tmp_path / 'bad.csv'}")
    assert problem in found
    assert set(tmp_path.iterdir()) == before


def test_a_function_is_called_once_to_validate_it(config_file, tmp_path, monkeypatch):
    (tmp_path / "rows_of_a_run.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        "calls = []\n"
        "def load():\n"
        "    calls.append(1)\n"
        "    rows = {'text': ['a good day', 'a bad day'] * 16, 'label': [1, 0] * 16}\n"
        "    return DatasetDict(train=Dataset.from_dict(rows))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["data={source: function, function: 'rows_of_a_run:load'}"]
    validate(str(config_file), given, None, allow_code=True)
    assert sys.modules.pop("rows_of_a_run").calls == [1]


def test_a_renamed_column_is_there(config_file):
    overrides = ["task.text=[sentence]", "data.rename={text: sentence}"]
    validate(str(config_file), overrides, None)


def test_missing_data_files_are_all_named(config_file):
    found = problems(config_file, "data.train=no.csv", "data.validation=none.csv")
    assert found == ["data.train: no.csv is not a file", "data.validation: none.csv is not a file"]


def test_a_missing_data_file(config_file):
    assert only_problem(config_file, "data.train=no.csv") == "data.train: no.csv is not a file"


# The schedule, the batches and the workers.


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.length=20", "prune.start_after=12", "prune.finetune=8"],
        ["train.length=20", "prune.start_after=19", "prune.finetune=10%"],
        ["train.length=2ep", "prune.start_after=1ep", "prune.finetune=1ep"],
        ["train.length=2ep", "prune.start_after=60%", "prune.finetune=60%"],
        ["train.length=3ep", "prune.start_after=1.5ep", "prune.finetune=2ep"],
    ],
)
def test_prune_start_must_come_before_prune_end(config_file, overrides):
    problem = only_problem(config_file, *overrides)
    assert problem.startswith("prune: prune_start (")
    assert "must come before prune_end" in problem


def test_pruning_cannot_start_from_a_dense_model_that_is_not_trained(config_file):
    problem = only_problem(config_file, "prune.start_from=dense", "dense.enabled=false")
    assert problem.startswith("prune.start_from: got 'dense'")


def test_a_run_of_no_length_is_refused(config_file):
    problem = only_problem(config_file, "train.length=0")
    assert problem == "train.length: got '0'; must be above 0"


@pytest.mark.parametrize(
    ("overrides", "allowed"),
    [
        # 43 rows (five held out) are five batches of eight: an epoch is five steps.
        (["train.length=2ep", "prune.start_after=3", "prune.finetune=10%"], True),
        (["train.length=2ep", "prune.start_after=6", "prune.finetune=1ep"], False),
        (["train.length=12", "prune.start_after=1ep", "prune.finetune=1ep"], True),
        (["train.length=10", "prune.start_after=1ep", "prune.finetune=1ep"], False),
        (["train.length=10", "prune.start_after=1ep", "prune.finetune=5"], False),
    ],
)
def test_a_schedule_in_steps_and_epochs_is_held_against_the_rows(config_file, overrides, allowed):
    if allowed:
        validate(str(config_file), overrides, None)
    else:
        assert only_problem(config_file, *overrides).startswith("prune: prune_start")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.max_train_rows=7"], "train.batch_size: 7 training rows do not fill one batch"),
        (
            ["train.length=0.05ep"],
            "train.length: '0.05ep' of 5 steps per epoch is less than one optimizer step",
        ),
        (
            ["dense.length=0.05ep"],
            "dense.length: '0.05ep' of 5 steps per epoch is less than one optimizer step",
        ),
        (["data.validation_share=0.99"], "data.validation_share: 0.99 of 48 training rows leaves"),
    ],
)
def test_too_few_rows_are_told_before_anything_starts(config_file, overrides, problem):
    assert only_problem(config_file, *overrides).startswith(problem)


@pytest.mark.parametrize("section", ["train", "dense"])
def test_a_run_cannot_last_a_share_of_itself(config_file, section):
    problem = only_problem(config_file, f"{section}.length=50%")
    assert problem == f"{section}.length: '50%' is a share; give steps or epochs"


def test_more_processes_than_a_node_has_cores(config_file):
    problem = only_problem(config_file, "data.num_proc=5", capacity=TWO_NODES)
    assert problem == (
        "data.num_proc: no node has as many cores; the most are 4, got 5; auto takes those that are free"
    )
    for fitting in (4, "auto"):
        assert validate(str(config_file), [f"data.num_proc={fitting}"], TWO_NODES)
    for wrong in (0, "all"):
        assert problems(config_file, f"data.num_proc={wrong}", capacity=TWO_NODES)


def test_more_workers_than_the_cluster_holds(config_file):
    overrides = ["cluster.num_workers=4", "cluster.cpus_per_worker=2"]
    problem = only_problem(config_file, *overrides, capacity=TWO_NODES)
    assert problem == (
        "cluster.num_workers: got 4 workers of 2 CPUs and 0 GPUs; the cluster can hold 3 "
        "(nodes: 1 of 4 CPUs and 0 GPUs, 1 of 3 CPUs and 0 GPUs)"
    )
    assert validate(str(config_file), overrides, None).cluster.num_workers == 4


def test_the_nodes_are_told_in_one_order_and_equal_ones_once():
    nodes = [(8.0, 0.0), (96.0, 8.0), (8.0, 0.0), (96.0, 8.0), (96.0, 8.0)]
    told = {str(Capacity(nodes=tuple(order))) for order in itertools.permutations(nodes)}
    assert told == {"3 of 96 CPUs and 8 GPUs, 2 of 8 CPUs and 0 GPUs"}


def test_workers_with_gpus_on_a_cluster_without(config_file):
    problem = only_problem(config_file, "cluster.gpus_per_worker=1", capacity=TWO_NODES)
    assert "the cluster can hold 0" in problem


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "fitting"),
    [
        (((4, 0),), 1, 0, 4),
        (((4, 0), (3, 0)), 2, 0, 3),
        (((16, 8), (16, 2)), 1, 1, 10),
        (((4, 8),), 2, 1, 2),
        (((4, 0),), 1, 1, 0),
        (((0.5, 0),), 1, 0, 0),
        ((), 1, 0, 0),
    ],
)
def test_a_worker_does_not_span_nodes(nodes, cpus, gpus, fitting):
    assert Capacity(nodes=nodes).num_workers(cpus, gpus) == fitting


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_size=8", "cluster.num_workers=3"],
        ["train.batch_size=2", "cluster.num_workers=4"],
        ["train.batch_size=8", "train.micro_batch_size=3"],
        ["train.batch_size=8", "train.micro_batch_size=4", "cluster.num_workers=4"],
    ],
)
def test_batch_size_must_be_a_multiple_of_the_workers(config_file, overrides):
    problem = only_problem(config_file, *overrides)
    assert problem.startswith("train.batch_size: batch_size ")
    assert "must be a multiple of micro_batch_size" in problem
    assert problem.endswith("(cluster.num_workers)")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["zero.stage=0", "zero.precision=fp16"], "zero.precision"),
        (["zero.stage=2", "zero.offload_parameters=true"], "zero.offload_parameters"),
        (["prune.method={name: mgpp, spike_threshold: 1e6}"], "prune.method"),
        (["zero.stage=0", "zero.offload_optimizer=true"], "zero.offload_optimizer"),
        (["zero.precision=bf16", "zero.gradients=fp16"], "zero.gradients"),
    ],
)
def test_zero_settings_that_deepspeed_gets_wrong(config_file, overrides, key):
    assert only_problem(config_file, *overrides).startswith(f"{key}: ")


def test_problems_of_all_kinds_at_once(config_file, tmp_path):
    found = problems(
        config_file,
        "nonsense=1",
        "evaluate.batch_size=none",
        f"model.path={tmp_path / 'nowhere'}",
        "task.label=sentiment",
        "train.length=4",
        "train.batch_size=9",
        "zero.stage=0",
        "zero.precision=fp16",
        "cluster.num_workers=8",
        capacity=TWO_NODES,
    )
    keys = [re.split(r"[: ]", line)[0] for line in found]
    assert keys == [
        "nonsense",
        "evaluate.batch_size",
        "model.path",
        "task.label",
        "zero.precision",
        "train.batch_size",
        "prune",
        "cluster.num_workers",
    ]


@pytest.mark.parametrize("section", ["model", "task", "data", "train", "prune", "zero", "cluster"])
def test_a_section_that_does_not_parse_hides_nothing_else(config_file, section):
    found = problems(config_file, f"{section}=null", "evaluate.max_rows=0", capacity=TWO_NODES)
    assert {line.split(":")[0] for line in found} == {section, "evaluate.max_rows"}


# Once the number of rows is known.


def test_rows_that_fill_a_batch_and_a_schedule_that_fits(config_file):
    config = validate(str(config_file), [], None)
    assert check_schedule(config, num_rows=8) is None


def test_rows_that_do_not_fill_a_batch(config_file):
    config = validate(str(config_file), [], None)
    with pytest.raises(ConfigError) as raised:
        check_schedule(config, num_rows=7)
    assert [str(p) for p in raised.value.problems] == [
        "train.batch_size: 7 training rows do not fill one batch of 8"
    ]


def test_blocks_of_text_are_counted_where_steps_and_epochs_mix(config_file, tmp_path, monkeypatch):
    write_decoder("llama", tmp_path / "llama")
    rows = tmp_path / "text.txt"
    rows.write_text("w1 w2 w3\n" * 30, encoding="utf-8")  # 120 tokens: 30 blocks, three batches
    task = [
        f"model.path={tmp_path / 'llama'}",
        "task.type=causal-lm",
        "task.max_length=4",
        f"data.train=[{rows}]",
        f"data.validation=[{rows}]",
    ]
    validate(str(config_file), [*task, "train.length=3ep", "prune.start_after=3"], None)
    problem = only_problem(config_file, *task, "train.length=3ep", "prune.start_after=5")
    assert problem.startswith("prune: prune_start")
    # Of much text, once the data stage has counted.
    monkeypatch.setattr("pipeline.runs.validate._COUNTED_BYTES", 10)
    config = validate(str(config_file), [*task, "train.length=3ep", "prune.start_after=5"], None)
    with pytest.raises(ConfigError, match="prune: prune_start"):
        check_schedule(config, num_rows=30)


def test_a_one_shot_method_and_what_it_does_not_go_with(config_file):
    values = yaml.safe_load(config_file.read_text())
    values["prune"] = {"sparsity": 0.5, "method": {"name": "wanda"}}
    config_file.write_text(yaml.safe_dump(values), encoding="utf-8")
    problem = only_problem(config_file)
    assert problem == (
        "prune.method: wanda: only causal language models (task.type: causal-lm) are pruned in one shot"
    )


def test_a_one_shot_run_trains_nothing_and_needs_rows_to_go_by(tmp_path):
    write_decoder("llama", tmp_path / "llama")
    (tmp_path / "text.txt").write_text("\n".join(text(40, seed) for seed in range(9)))
    values = {
        "name": "one-shot",
        "model": {"path": str(tmp_path / "llama")},
        "task": {"type": "causal-lm", "max_length": 16},
        "data": {"source": "files", "train": str(tmp_path / "text.txt")},
        "train": {"batch_size": 7},
        "dense": {"enabled": False},
        "prune": {"sparsity": 0.5, "method": {"name": "wanda"}},
        "cluster": {"num_workers": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    config = validate(str(path), [], None)
    check_schedule(config, 128)
    with pytest.raises(
        ConfigError, match=r"prune\.calibration_rows: there are 127 training blocks, got 128"
    ):
        check_schedule(config, 127)
    problem = only_problem(path, "dense.enabled=true")
    assert problem.startswith("train.batch_size: ")
    pattern = ["prune.pattern='4:5'", "prune.sparsity=0.2"]
    problem = only_problem(path, *pattern)
    assert problem.startswith(
        "prune.method: wanda: model.layers.0.self_attn.q_proj.weight: pattern 4:5"
    )
    problem = only_problem(path, "prune.include=['lm_head.weight']")
    assert problem.startswith("prune.method: wanda: LlamaForCausalLM has no list of decoder layers")
