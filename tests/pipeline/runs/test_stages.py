"""What a stage's key depends on: what changes its output, and nothing else."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.errors import ConfigError
from pipeline.runs.config import parse_config
from pipeline.runs.flow import plan_stages, run_stage
from pipeline.runs.hardware import NO_GPUS, settled
from pipeline.store.artifacts import Artifact, ArtifactStore
from pipeline.worker_group import WorkerGroup
from tests.html_page import Page
from tests.pipeline.models.word_chains import text
from tests.tiny import write_decoder


def keys(tiny_bert, words_csv, **changes):
    return {stage.name: stage.key for stage in stages(tiny_bert, words_csv, **changes)}


def stages(tiny_bert, words_csv, **changes):
    values = {
        "name": "keys",
        "storage": "runs",
        "model": {"path": str(tiny_bert)},
        "task": {"type": "question-answering", "max_length": 64, "stride": 16},
        "data": {"source": "files", "train": str(words_csv)},
        "train": {"length": 10},
        "prune": {"sparsity": 0.5},
    }
    for section, settings in changes.items():
        values[section] = {**values.get(section, {}), **settings}
    return plan_stages(settled(parse_config(values), NO_GPUS))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"data", "dense", "prune", "evaluate", "export", "report"}),
        ({"data": {"num_proc": 3}}, {"data", "dense", "prune", "evaluate", "export", "report"}),
        ({"task": {"stride": 8}}, set()),
        ({"task": {"num_best": 5, "max_answer_length": 7}}, {"data", "dense", "prune"}),
        ({"task": {"metric": "exact_match"}}, {"data", "dense", "prune", "evaluate", "export"}),
        ({"evaluate": {"batch_size": 5}}, {"data", "dense", "prune"}),
        ({"prune": {"sparsity": 0.6}}, {"data", "dense"}),
        ({"prune": {"scope": "uniform"}}, {"data", "dense"}),
        ({"prune": {"pattern": "2:4"}}, {"data", "dense"}),
        (
            {"prune": {"scope": "global", "budgets": {}, "min_kept": 0.0, "pattern": None}},
            {"data", "dense", "prune", "evaluate", "export", "report"},
        ),
        ({"prune": {"method": {"name": "platon", "beta1": 0.5}}}, {"data", "dense"}),
        ({"train": {"lr": 1e-3}}, {"data"}),
        ({"train": {"group_by_length": True}}, {"data"}),
        (
            {"train": {"group_by_length": False}},
            {"data", "dense", "prune", "evaluate", "export", "report"},
        ),
        ({"zero": {"precision": "bf16"}}, {"data"}),
        ({"distill": {"teacher": "dense"}}, {"data", "dense"}),
        (
            {"cluster": {"num_workers": 4}, "zero": {"stage": 3, "offload_optimizer": True}},
            {"data", "dense", "prune", "evaluate", "export", "report"},
        ),
    ],
)
def test_a_change_makes_new_what_depends_on_it(tiny_bert, words_csv, changes, kept):
    before, after = keys(tiny_bert, words_csv), keys(tiny_bert, words_csv, **changes)
    assert {name for name in before if before[name] == after[name]} == kept


@pytest.mark.parametrize("with_loss", [True, False])
def test_only_a_loss_of_routers_depends_on_the_micro_batches(tmp_path, words_csv, with_loss):
    write_decoder("mixtral", tmp_path)
    found = []
    for changes in (
        {},
        {"cluster": {"num_workers": 4}},
        {"cluster": {"num_workers": 2}, "train": {"micro_batch_size": 8}},
    ):
        config = {
            "name": "keys",
            "model": {
                "path": str(tmp_path),
                "overrides": {"output_router_logits": with_loss},
            },
            "task": {"type": "causal-lm"},
            "data": {"source": "files", "train": str(words_csv)},
            "prune": {"sparsity": 0.5},
            **changes,
        }
        made = {
            stage.name: stage.key for stage in plan_stages(settled(parse_config(config), NO_GPUS))
        }
        found.append((made["dense"], made["prune"]))
    whole, quarter, also_quarter = found
    assert quarter == also_quarter
    assert [a != b for a, b in zip(whole, quarter, strict=True)] == [with_loss] * 2


ONE_SHOT = {"method": {"name": "sparsegpt"}, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"train": {"lr": 1e-3, "length": 5, "batch_size": 8}}, {"data", "prune"}),
        ({"zero": {"stage": 0, "precision": "fp32"}}, {"data", "dense", "prune"}),
        ({"train": {"seed": 1}}, {"data"}),
        ({"zero": {"precision": "bf16"}}, {"data"}),
        ({"prune": {**ONE_SHOT, "calibration_rows": 64}}, {"data", "dense"}),
        ({"prune": {"method": {"name": "sparsegpt", "damping": 0.1}}}, {"data", "dense"}),
        ({"prune": {**ONE_SHOT, "start_from": "dense"}}, {"data", "dense"}),
    ],
)
def test_what_a_one_shot_method_s_result_depends_on(tiny_bert, words_csv, changes, kept):
    before = keys(tiny_bert, words_csv, prune=ONE_SHOT)
    after = keys(tiny_bert, words_csv, **{"prune": ONE_SHOT, **changes})
    assert {n for n in ("data", "dense", "prune") if before[n] == after[n]} == kept


def test_started_from_the_dense_model_it_depends_on_that_one_s_training(tiny_bert, words_csv):
    prune = {**ONE_SHOT, "start_from": "dense"}
    before = keys(tiny_bert, words_csv, prune=prune)
    after = keys(tiny_bert, words_csv, prune=prune, train={"lr": 1e-3})
    assert before["prune"] != after["prune"]


@pytest.fixture
def one_shot_run(tmp_path, datasets_cache):
    """A configuration of a one-shot run on a tiny Llama, and this process as its only worker."""
    write_decoder("llama", tmp_path / "llama")
    for name in ("train", "validation"):
        lines = "\n".join(text(40, seed) for seed in range(4))
        (tmp_path / f"{name}.txt").write_text(lines, encoding="utf-8")
    values = {
        "name": "one-shot",
        "storage": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "llama")},
        "task": {"type": "causal-lm", "max_length": 16},
        "data": {
            "source": "files",
            "train": str(tmp_path / "train.txt"),
            "validation": str(tmp_path / "validation.txt"),
        },
        "dense": {"enabled": False},
        "prune": {**ONE_SHOT, "calibration_rows": 8},
    }
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield settled(parse_config(values), NO_GPUS)
    dist.destroy_process_group()


def test_a_one_shot_run_from_data_to_report(one_shot_run, bucket):
    store, workers, records = ArtifactStore(one_shot_run.storage), WorkerGroup.current(), []
    done: dict[str, Artifact] = {}
    for stage in plan_stages(one_shot_run):
        inputs = {name: done[name] for name in stage.inputs}
        made = run_stage(
            stage,
            one_shot_run,
            store,
            inputs,
            workers=workers if stage.on_all_workers else None,
            progress=records.append,
        )
        assert made is not None
        done[stage.name] = made
    assert [record["step"] for record in records if record["event"] == "layer"] == [0, 1, 2]
    pruned, exported = done["prune"].metrics, done["export"].metrics
    assert pruned["num_pruned"] == pruned["num_prunable"] // 2
    assert exported["num_zeros"] == pruned["num_zeros"]
    assert exported["num_prunable"] == pruned["num_prunable"]
    assert set(done["evaluate"].metrics) == {"pruned"}
    assert not (
        Path(store.folder_of("prune", plan_stages(one_shot_run)[1].key)) / "checkpoints"
    ).exists()
    page = Page((done["report"].path / "report.html").read_text())
    assert "50.00%" in page.text
    assert "SparseGPT" in page.text
    assert "Sparsity by layer and matrix" in page.titles
    perplexity = f"{done['evaluate'].metrics['pruned']['perplexity']:,.2f}"
    assert perplexity in page.text
    card = (done["export"].path / "model" / "README.md").read_text()
    assert "`, pruned to **50.00%** by\nSPARSEGPT" in card
    assert "Pruned in one shot, without training" in card
    assert f"| perplexity | {perplexity} |" in card

    # To an object store: the same, with no weights in the folder that is uploaded.
    (stage,) = (stage for stage in plan_stages(one_shot_run) if stage.name == "export")
    inputs = {name: done[name] for name in stage.inputs}
    upload = ArtifactStore.upload

    def upload_rest(self, folder, url):
        assert (folder / "model" / "config.json").is_file()
        assert not list(folder.rglob("*.safetensors"))
        upload(self, folder, url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArtifactStore, "upload", upload_rest)
        streamed = run_stage(
            stage,
            one_shot_run,
            ArtifactStore(f"{bucket}/runs"),
            inputs,
            workers=None,
            progress=records.append,
        )
    assert streamed.files == done["export"].files
    assert streamed.metrics == exported
    assert (streamed.path / "model" / "model.safetensors").is_file()  # fetched and checked


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("seeded", [True, False])
def test_the_data_stage_takes_only_the_rows_its_key_is_made_of(
    tiny_bert, tmp_path, monkeypatch, seeded
):
    name = f"rows_of_a_stage_{seeded}".lower()
    source = f"""
import random
from datasets import Dataset

def rows():
    draw = random.Random({0 if seeded else None})
    texts = [f"a {{word}} day {{draw.random()}}" for word in ("good", "bad")] * 8
    made = Dataset.from_dict({{"text": texts, "label": [1, 0] * 8}})
    return made.train_test_split(0.25, seed=0)

def splits():
    made = rows()
    made["validation"] = made.pop("test")
    return made
"""
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = parse_config(
        {
            "name": "rows",
            "storage": str(tmp_path / "runs"),
            "model": {"path": str(tiny_bert)},
            "task": {"type": "classification", "text": ["text"], "label": "label"},
            "data": {"source": "function", "function": f"{name}:splits"},
            "prune": {"sparsity": 0.5},
        },
        allow_code=True,
    )
    data, store = plan_stages(settled(config, NO_GPUS))[0], ArtifactStore(config.storage)
    if seeded:
        run_stage(data, config, store, {}, workers=None, progress=lambda record: None)
        assert store.find(data.name, data.key).metrics["num_rows"] == {"train": 12, "validation": 4}
        return
    with pytest.raises(ConfigError, match="returned other rows than when the run's keys"):
        run_stage(data, config, store, {}, workers=None, progress=lambda record: None)
    assert store.find(data.name, data.key) is None


def test_a_dense_teacher_is_an_input_and_another_is_named_by_its_content(
    tiny_bert, words_csv, tmp_path
):
    def prune(**distill):
        made = stages(tiny_bert, words_csv, distill=distill)
        return next(stage for stage in made if stage.name == "prune")

    dense = prune(teacher="dense")
    assert dense.inputs == ("data", "dense")
    assert prune(weight=0.5, temperature=2.0).key == dense.key  # the defaults
    teacher, copied = tmp_path / "teacher", tmp_path / "copied"
    for folder in (teacher, copied):
        shutil.copytree(tiny_bert, folder)
    other = prune(teacher=str(teacher))
    assert other.inputs == ("data",)
    assert prune(teacher=str(copied)).key == other.key
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    keys = {
        prune(**changes).key
        for changes in (
            {"teacher": "dense"},
            {"teacher": "dense", "weight": 0.6},
            {"teacher": "dense", "temperature": 3},
            {"teacher": "dense", "hidden_weight": 1},
            {"teacher": str(teacher)},
            {"teacher": str(copied)},
        )
    }
    assert len(keys) == 6
