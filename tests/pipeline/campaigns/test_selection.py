"""Cells, the choice of candidates, and the table of a comparison; figures by hand."""

import csv
import json

import numpy as np
import pytest
import yaml

from pipeline.campaigns.comparison_report import write_comparison
from pipeline.campaigns.curves import loss_curve
from pipeline.campaigns.selection import (
    choose,
    final_cells,
    read_comparison,
    selection_cells,
    table,
)
from pipeline.errors import ConfigError
from tests.processes import ROOT

VALUES = {
    "name": "words",
    "recipe": "run.yaml",
    "changes": {"dense.enabled": False, "train": {"length": "2ep", "lr": 9.0}},
    "sparsities": [0.5, 0.9],
    "seeds": [3, 5],
    "selection": {"changes": {"data.validation": None}, "seeds": [7, 8]},
    "methods": {
        "A": {
            "changes": {"prune.method": {"name": "gmp"}},
            "candidates": [{"train.lr": 0.1}, {"train.lr": 0.2}],
        },
        "B": {
            "changes": {"prune.method": {"name": "mgpp", "spike_var": 1e-9}},
            "candidates": [{"train.lr": 0.3}, {"train.lr": 0.4}],
        },
    },
}

RECORDS = [
    {"step": step, "loss": loss, "sparsity": sparsity}
    for step, loss, sparsity in zip(
        range(2, 12, 2), (0.9, 0.8, 0.6, 0.5, 0.4), (0.0, 0.5, 0.85, 0.9, 0.9), strict=True
    )
]


def read(folder, **changes):
    (folder / "run.yaml").write_text("name: run\n")
    (folder / "comparison.yaml").write_text(yaml.safe_dump({**VALUES, **changes}))
    return read_comparison(str(folder / "comparison.yaml"))


@pytest.fixture
def comparison(tmp_path):
    return read(tmp_path)


def test_selection_tries_every_candidate_of_every_method_with_the_same_effort(comparison):
    cells = selection_cells(comparison)
    assert len(cells) == 2 * 2 * 2 * 2  # seeds, sparsities, methods, candidates
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert "data.validation=null" in cell.overrides
        assert cell.seed in (7, 8)
        assert f"train.seed={cell.seed}" in cell.overrides
    of_a = [c.overrides for c in cells if c.method == "A" and c.candidate == 1]
    assert all("train.lr=0.2" in overrides for overrides in of_a)


def test_final_cells_never_see_the_changes_of_the_selection(comparison):
    chosen = {("A", 0.5): 1, ("A", 0.9): 0, ("B", 0.5): 0, ("B", 0.9): 1}
    cells = final_cells(comparison, chosen)
    assert len(cells) == 2 + 2 * 2 * 2
    assert not any("data.validation" in text for cell in cells for text in cell.overrides)
    found = {
        (c.method, c.sparsity): [o for o in c.overrides if o.startswith("train.lr")]
        for c in cells
        if c.is_pruned
    }
    assert found == {
        ("A", 0.5): ["train.lr=0.2"],
        ("A", 0.9): ["train.lr=0.1"],
        ("B", 0.5): ["train.lr=0.3"],
        ("B", 0.9): ["train.lr=0.4"],
    }
    dense = [c for c in cells if not c.is_pruned]
    assert [c.seed for c in dense] == [3, 5]
    assert all("dense.enabled=true" in c.overrides for c in dense)


def test_overrides_reach_the_recipe_as_they_were_given(comparison, tmp_path):
    from pipeline.runs.config import read_config

    cell = next(c for c in selection_cells(comparison) if c.method == "B")
    values, problems = read_config(str(tmp_path / "run.yaml"), cell.overrides)
    assert problems == []
    assert values["prune"]["method"] == {"name": "mgpp", "spike_var": 1e-9}
    assert values["data"]["validation"] is None
    assert values["train"]["length"] == "2ep"


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_best_mean_over_the_seeds_is_chosen_for_each_sparsity(comparison, higher_is_better):
    generator = np.random.default_rng(0)
    scores = {cell: float(generator.random()) for cell in selection_cells(comparison)}
    chosen = choose(comparison, scores, higher_is_better=higher_is_better)
    for (method, sparsity), candidate in chosen.items():
        means = [
            np.mean([s for c, s in scores.items() if (c.method, c.sparsity, c.candidate) == key])
            for key in ((method, sparsity, 0), (method, sparsity, 1))
        ]
        assert candidate == (np.argmax(means) if higher_is_better else np.argmin(means))


def test_one_candidate_may_be_chosen_for_all_sparsities(tmp_path):
    selection = {**VALUES["selection"], "sparsities": [0.9]}
    comparison = read(tmp_path, selection=selection)
    cells = selection_cells(comparison)
    assert {cell.sparsity for cell in cells} == {0.9}
    scores = {cell: float(cell.candidate) for cell in cells}
    assert set(choose(comparison, scores, higher_is_better=True).values()) == {1}


def test_without_a_choice_nothing_is_run_for_it(tmp_path):
    methods = {name: {"changes": m["changes"]} for name, m in VALUES["methods"].items()}
    comparison = read(tmp_path, methods=methods, selection=None)
    assert selection_cells(comparison) == []
    assert set(choose(comparison, {}, higher_is_better=True).values()) == {0}


def test_table_plot_and_files_say_the_same(comparison, tmp_path):
    chosen = {(m, s): 1 for m in ("A", "B") for s in (0.5, 0.9)}
    cells = final_cells(comparison, chosen)
    generator = np.random.default_rng(1)
    scores = {cell: float(generator.random()) for cell in cells}
    rows = table(comparison, chosen, scores)
    assert [(row.method, row.sparsity) for row in rows] == [
        ("dense", 0.0),
        ("A", 0.5),
        ("B", 0.5),
        ("A", 0.9),
        ("B", 0.9),
    ]
    for row in rows:
        values = [
            s for c, s in scores.items() if (c.method, c.sparsity) == (row.method, row.sparsity)
        ]
        assert row.mean == pytest.approx(np.mean(values))
        assert row.spread == pytest.approx(np.std(values, ddof=1))
    curves = {cell: loss_curve(RECORDS) for cell in cells if cell.is_pruned}
    write_comparison(tmp_path, comparison, rows, {}, curves, metric="accuracy")
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["rows"][1]["settings"] == {"train.lr": 0.2}
    with (tmp_path / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(cells)
    assert float(lines[0]["accuracy"]) == scores[cells[0]]
    table_text = (tmp_path / "comparison.md").read_text()
    a = rows[1]
    assert f"| A | {100 * a.mean:.2f} ± {100 * a.spread:.2f} |" in table_text
    with (tmp_path / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == len(curves) * len(RECORDS)
    assert [float(p["loss"]) for p in points[: len(RECORDS)]] == [r["loss"] for r in RECORDS]
    assert "| B | 0.800 | 0.600 | 0.600 | 0.500 | 0.400 |" in table_text
    for name in ("comparison.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_told_where_the_sparsity_first_reaches_a_level():
    # 0.9 is reached at step 8; half, three quarters, nine tenths of it before or there.
    curve = loss_curve(RECORDS)
    assert curve.losses_at_levels() == (0.8, 0.6, 0.6, 0.5, 0.4)


def test_what_a_teacher_adds_to_the_loss_is_left_out():
    records = [{**r, "loss": 7.0, "task_loss": r["loss"]} for r in RECORDS]
    assert loss_curve(records) == loss_curve(RECORDS)


def test_methods_that_do_not_train_have_no_curves(comparison, tmp_path):
    chosen = {(m, s): 0 for m in ("A", "B") for s in (0.5, 0.9)}
    rows = table(comparison, chosen, dict.fromkeys(final_cells(comparison, chosen), 0.5))
    write_comparison(tmp_path, comparison, rows, {}, {}, metric="accuracy")
    assert not list(tmp_path.glob("curves.*"))
    assert "Training loss" not in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=str)
def test_every_candidate_of_the_comparisons_here_is_a_run(path):
    from pipeline.runs.config import parse_config, read_config

    comparison = read_comparison(str(path))
    for cell in selection_cells(comparison):
        values, problems = read_config(comparison.recipe, cell.overrides)
        assert problems == []
        parse_config(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": None}, "selection is missing"),
        ({"methods": {**VALUES["methods"], "C": {}}}, "every method must have as many candidates"),
        ({"methods": {"dense": {}}}, "no name of a method"),
        ({"sparsities": [1.5]}, "sparsities.0: .*less than 1"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"recipe": "none.yaml"}, "recipe: .*none.yaml is not a file"),
        ({"speed": 1}, "speed: "),
    ],
)
def test_what_is_wrong_is_told_with_its_key(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)
