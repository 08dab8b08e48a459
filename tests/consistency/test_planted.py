"""The planted teacher and the measures of how much of it is found."""

import json

import pytest
import torch

from pipeline.data.function import FunctionConfig
from pipeline.data.stage import load_splits
from tests.consistency.__main__ import averages, write_figure
from tests.consistency.planted import (
    LARGEST,
    LENGTH,
    SMALLEST,
    WIDTH,
    draw_samples,
    make_student,
    plant_teacher,
    predict,
    support_metrics,
)
from tests.consistency.trial import Trial, path_of, run_and_keep


@pytest.mark.parametrize("sparsity", [0.9, 0.83])
def test_the_teacher_has_exactly_the_zeros_asked_for(sparsity):
    teacher, names = plant_teacher(1, sparsity)
    weights = [teacher.get_parameter(name).detach() for name in names]
    flat = torch.cat([weight.view(-1) for weight in weights])
    assert flat.numel() == WIDTH * WIDTH + 2 * WIDTH * 2 * WIDTH
    assert int((flat == 0).sum()) == int(flat.numel() * sparsity)
    true = flat[flat != 0].abs()
    assert true.min() >= SMALLEST
    assert true.max() <= LARGEST
    gate, down = (
        next(w for n, w in zip(names, weights, strict=True) if k in n) for k in ("gate", "down")
    )
    assert (gate != 0).any(dim=1).all()
    assert (down != 0).any(dim=0).all()
    again, _ = plant_teacher(1, sparsity)
    other, _ = plant_teacher(2, sparsity)
    for name in names:
        assert torch.equal(teacher.get_parameter(name), again.get_parameter(name))
        assert not torch.equal(teacher.get_parameter(name), other.get_parameter(name))


def test_a_sparsity_that_leaves_dead_units_is_refused():
    with pytest.raises(ValueError, match=r"sparsity 0\.99 leaves hidden units without weights"):
        plant_teacher(0, 0.99)


def test_samples_are_the_teacher_s_outputs_and_noise():
    teacher, _ = plant_teacher(0)
    tokens, outputs = draw_samples(teacher, 2000, seed=5)
    clean = predict(teacher, tokens)
    assert outputs.shape == (2000, LENGTH, WIDTH)
    assert (outputs - clean).std().item() == pytest.approx(0.1, rel=0.02)
    assert clean.std().item() == pytest.approx(1.0, rel=0.05)


def test_it_is_a_data_source():
    function = "tests.consistency.planted:load_samples"
    arguments = {"n": 7, "fresh": 5}
    config = FunctionConfig(source="function", function=function, arguments=arguments)
    splits = load_splits(config)
    assert {name: len(split) for name, split in splits.items()} == {"train": 7, "validation": 5}
    teacher, _ = plant_teacher(0)
    tokens = torch.tensor(splits["validation"]["input_ids"][:])
    labels = torch.tensor(splits["validation"]["labels"][:])
    assert torch.allclose(predict(teacher, tokens), labels)


def test_the_student_knows_all_but_the_planted_matrices():
    teacher, names = plant_teacher(0)
    student = make_student(teacher, names, seed=1)
    for name, weight in student.named_parameters():
        same = torch.equal(weight, teacher.get_parameter(name))
        assert same == (name not in names), name
        assert weight.requires_grad == (name in names), name
    noise = torch.cat(
        [(student.get_parameter(n) - teacher.get_parameter(n)).view(-1) for n in names]
    )
    assert noise.std().item() == pytest.approx(SMALLEST, rel=0.1)


def test_metrics_on_cases_by_hand():
    true = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    found = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    expected = {"precision": 1 / 2, "recall": 2 / 3, "f1": 4 / 7, "jaccard": 2 / 5}
    assert support_metrics(found, true) == pytest.approx(expected)
    assert set(support_metrics(true, true).values()) == {1.0}
    assert set(support_metrics(~true, true).values()) == {0.0}
    assert set(support_metrics(~true & false_like(true), true).values()) == {0.0}


def false_like(mask):
    return torch.zeros_like(mask)


@pytest.mark.slow
def test_cells_are_kept_averaged_and_drawn(tmp_path):
    trials = [Trial(n=8, method=method, seed=0, num_steps=20) for method in ("mgpp", "gmp")]
    results = [run_and_keep(trial, tmp_path) for trial in trials]
    for trial, result in zip(trials, results, strict=True):
        assert (
            result["precision"] == result["recall"] == result["f1"]
        )  # as many are kept as are true
        assert 0 < result["f1"] < 1
        assert result["error"] > 0
        kept = {**result, "f1": 0.25}
        path_of(trial, tmp_path).write_text(json.dumps(kept))
        assert run_and_keep(trial, tmp_path) == kept  # read, not run again
    assert path_of(trials[0], tmp_path) != path_of(Trial(n=8, method="mgpp", seed=0), tmp_path)
    (row,) = averages([{**results[0], "f1": f1} for f1 in (0.2, 0.4)])
    assert row["f1"] == pytest.approx(0.3)
    write_figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
