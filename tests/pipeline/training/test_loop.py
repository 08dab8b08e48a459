"""Training as a plain function on ranks: interrupted anywhere, it ends as if it never was."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification

from pipeline.tracking.recorder import read_records
from pipeline.training.config import TrainConfig
from tests.cases import launch_cases
from tests.pipeline.training.train_worker import (
    ALL_CASES,
    ASKED,
    ASKED_AT,
    CASES,
    DAMAGED,
    DISTILL_STOP,
    DISTILLED,
    LENGTH,
    NAN_CASES,
    STOP_AFTER,
    TEACHER,
)


@pytest.fixture(scope="module")
def trained(tiny_bert, train_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    shutil.copytree(train_data, folder / "data")
    rows = Dataset.load_from_disk(str(train_data / "dataset" / "train")).to_list()
    shutil.copytree(folder / "data", folder / "nan-data")
    numbers = [{**row, "labels": float(row["labels"])} for row in rows]
    numbers[30]["labels"] = float("nan")
    splits = DatasetDict(train=Dataset.from_list(numbers), validation=Dataset.from_list(numbers))
    splits.save_to_disk(str(folder / "nan-data" / "dataset"))
    arguments = [str(tiny_bert), str(folder / "data"), str(folder / "out")]
    return launch_cases(
        "tests.pipeline.training.train_worker",
        *arguments,
        cases=ALL_CASES,
        folder=folder / "out",
        num_processes=2,
        timeout=400,
    )


def weights_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "weights.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("stop", STOP_AFTER)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(trained, case, stop):
    folder = trained.folder(case)
    whole, resumed = folder / f"{case}-None", folder / f"{case}-{stop}"
    assert weights_of(resumed) == weights_of(whole)
    for event in ("prune", "layers"):
        a, b = (read_records(f / "metrics.jsonl")[event] for f in (whole, resumed))
        assert a == b
    figures = [json.loads((f / "figures.json").read_text()) for f in (whole, resumed)]
    assert figures[0] == figures[1]


@pytest.mark.distributed
def test_what_one_rank_is_asked_all_do_after_the_step_under_way(trained):
    folder = trained.folder(ASKED, "asked")
    (told, figures), other = (
        json.loads((folder / f"asked-{rank}.json").read_text()) for rank in (0, 1)
    )
    saved = f"saved at step {ASKED_AT}"
    assert told == [saved, ASKED_AT, saved, "no step is saved", None]
    assert other == [told, figures]
    assert weights_of(folder / "asked") == weights_of(folder / f"{ASKED}-None")
    assert figures == json.loads((folder / f"{ASKED}-None" / "figures.json").read_text())


@pytest.mark.distributed
def test_the_stop_flag_takes_no_collective_of_its_own(trained):
    """The one sum that weighs a step's micro-batches has it; the rest is DeepSpeed's."""
    counts = json.loads((trained.folder("counted") / "counted.json").read_text())
    assert counts[1] == counts[2] + 1 > 1


@pytest.mark.distributed
def test_where_all_checkpoints_are_damaged_the_run_begins_with_the_model_it_was_given(trained):
    """Rank 0 had read its undamaged part into the engine by then."""
    folder = trained.folder(DAMAGED, "damaged")
    assert weights_of(folder / "damaged") == weights_of(folder / f"{DAMAGED}-None")
    notes = json.loads((folder / "damaged" / "notes.json").read_text())
    corrupt = [note for note in notes if "is corrupt and skipped: state-r00001-" in note]
    assert len(corrupt) == 2
    assert not any("resuming" in note for note in notes)


@pytest.mark.distributed
def test_where_one_node_has_no_memory_for_a_copy_all_write_in_the_foreground(trained):
    notes = json.loads((trained.folder("damaged") / "damaged" / "notes.json").read_text())
    said = [note for note in notes if note.startswith("checkpoints are written")]
    assert len(said) == 2  # once by each of the two runs
    assert re.fullmatch(
        r"checkpoints are written in the foreground: a copy takes .* free on .*", said[0]
    )
    assert said[1].startswith("checkpoints are written in the background")


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_the_written_model_has_exactly_the_zeros_reported(trained, case):
    folder = trained.folder(case) / f"{case}-None"
    figures = json.loads((folder / "figures.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype="auto")
    matrices = [p for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2]
    num_prunable = sum(p.numel() for p in matrices)
    assert figures["num_prunable"] == num_prunable
    assert figures["num_pruned"] == int(num_prunable * 0.7)
    assert sum(int((p == 0).sum()) for p in matrices) == figures["num_zeros"]
    assert figures["num_zeros"] == figures["num_pruned"]
    assert (
        sum(entry.get("zeros", 0) for entry in weights_of(folder).values()) == figures["num_zeros"]
    )


@pytest.mark.distributed
def test_no_compiler_is_imported_for_an_optimizer_that_is_not_used(trained):
    trained.folder("uncompiled")


@pytest.mark.distributed
def test_records_cover_the_run_once(trained):
    steps = read_records(trained.folder("stage2") / "stage2-9" / "metrics.jsonl")["step"]
    assert [r["step"] for r in steps][-1] == LENGTH - 1
    assert len({r["step"] for r in steps}) == len(steps)
    assert steps[0]["loss"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize("case", NAN_CASES)
def test_a_gradient_that_is_not_finite_stops_the_run_or_is_left_out(trained, case):
    folder = trained.folder(f"{case}-nan") / f"{case}-nan"
    found = json.loads((folder / "found.json").read_text())
    records = read_records(folder / "metrics.jsonl")
    first = records["skip"][0]["step"]
    assert f"the gradient of step {first} is not finite" in found["error"]
    assert found["last_checkpoint"] == first  # the steps before it, all of them good
    # Gone on from there: an epoch is six batches, one of them with the row; 20 steps take four epochs.
    assert 3 <= len(records["skip"]) <= 4
    assert found["figures"]["num_steps"] == LENGTH
    num_prunable = found["figures"]["num_prunable"]
    assert (
        found["figures"]["num_pruned"] == found["figures"]["num_zeros"] == int(num_prunable * 0.7)
    )
    assert all(math.isfinite(record["loss"]) for record in records["step"])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "static",
            "fp16 overflowed in 61 batches one after another, at a loss scale of 1.15292e+18",
        ),
        ("smallest", "fp16 overflows in step 0 at the smallest loss scale"),
    ],
)
def test_fp16_that_overflows_for_ever_stops_with_advice(trained, name, problem):
    error = (trained.folder(f"overflow-{name}") / f"overflow-{name}" / "error.txt").read_text()
    assert problem in error
    assert "or use bf16 or fp32 instead of fp16" in error


@pytest.mark.distributed
def test_a_sharded_teacher_teaches_what_a_whole_one_does(trained):
    """ZeRO 3 with everything sharded and ZeRO 2: the losses of every step."""
    folder = trained.folder(TEACHER, *(f"distilled-{case}" for case in DISTILLED))
    runs = [
        read_records(folder / f"distilled-{case}-None" / "metrics.jsonl")["step"]
        for case in DISTILLED
    ]
    assert [record["step"] for record in runs[0]] == list(range(LENGTH))
    for name in ("loss", "task_loss", "distill_loss", "hidden_loss"):
        whole, sharded = ([record[name] for record in run] for run in runs)
        assert sharded == pytest.approx(whole, abs=1e-5)
    for record in runs[0]:
        parts = 0.5 * record["task_loss"] + 0.5 * record["distill_loss"]
        assert record["loss"] == pytest.approx(parts + 0.5 * record["hidden_loss"], rel=1e-5)
    assert runs[0][-1]["hidden_loss"] < runs[0][0]["hidden_loss"]


@pytest.mark.distributed
def test_a_teacher_leaves_the_student_s_dropout_alone(trained):
    """With a weight that is 0 in float32, the run is that without a teacher, bit for bit."""
    folder = trained.folder(TEACHER, "silent", "distilled-stage2")
    assert weights_of(folder / "silent") == weights_of(folder / "undistilled")
    assert weights_of(folder / "distilled-stage2-None") != weights_of(folder / "undistilled")


@pytest.mark.distributed
def test_a_distilled_run_resumes_bit_for_bit(trained):
    name = f"distilled-{DISTILLED[-1]}"
    folder = trained.folder(TEACHER, name)
    whole, resumed = (folder / f"{name}-{stop}" for stop in (None, DISTILL_STOP))
    assert weights_of(resumed) == weights_of(whole)
    losses = [
        [record["distill_loss"] for record in read_records(folder / "metrics.jsonl")["step"]]
        for folder in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_learning_rate_rises_and_falls_linearly():
    config = TrainConfig(lr=1.0, lr_final_factor=0.2)
    assert [config.lr_at(t, 14, 4) for t in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert config.lr_at(4, 14, 4) == 1.0
    assert config.lr_at(9, 14, 4) == pytest.approx(0.6)
    assert config.lr_at(14, 14, 4) == pytest.approx(0.2)
