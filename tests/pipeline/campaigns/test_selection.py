"""How candidates are chosen: which runs choose, and that the rows of the table stay unseen."""

import math

import numpy as np
import pytest
import yaml

from pipeline.campaigns.grid import Place, campaign_runs, read_campaign
from pipeline.campaigns.selection import choose, selection_runs, was_chosen
from pipeline.errors import ConfigError
from pipeline.metric import perplexity, share
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
ACCURACY, PERPLEXITY = share("accuracy"), perplexity("perplexity")


def place(method, sparsity, task=""):
    return Place(task, "", method, sparsity)


def read(folder, **changes):
    (folder / "run.yaml").write_text("name: run\n")
    (folder / "campaign.yaml").write_text(yaml.safe_dump({**VALUES, **changes}))
    return read_campaign(str(folder / "campaign.yaml"))


@pytest.fixture
def campaign(tmp_path):
    return read(tmp_path)


def test_selection_tries_every_candidate_of_every_method_with_the_same_effort(campaign):
    runs = selection_runs(campaign)
    assert len(runs) == 2 * 2 * 2 * 2  # seeds, sparsities, methods, candidates
    assert len(set(runs)) == len(runs)
    for run in runs:
        assert "data.validation=null" in run.overrides
        assert run.seed in (7, 8)
        assert f"train.seed={run.seed}" in run.overrides
    of_a = [r.overrides for r in runs if r.place.method == "A" and r.candidate == 1]
    assert all("train.lr=0.2" in overrides for overrides in of_a)


def test_final_runs_never_see_the_changes_of_the_selection(campaign):
    chosen = {place("A", 0.5): 1, place("A", 0.9): 0, place("B", 0.5): 0, place("B", 0.9): 1}
    runs = campaign_runs(campaign, chosen)
    assert len(runs) == 2 + 2 * 2 * 2
    assert not any("data.validation" in text for run in runs for text in run.overrides)
    found = {
        r.place: [o for o in r.overrides if o.startswith("train.lr")]
        for r in runs
        if r.place.is_pruned
    }
    assert found == {
        place("A", 0.5): ["train.lr=0.2"],
        place("A", 0.9): ["train.lr=0.1"],
        place("B", 0.5): ["train.lr=0.3"],
        place("B", 0.9): ["train.lr=0.4"],
    }
    dense = [r for r in runs if not r.place.is_pruned]
    assert [r.seed for r in dense] == [3, 5]
    assert all("dense.enabled=true" in r.overrides for r in dense)


def test_overrides_reach_the_recipe_as_they_were_given(campaign, tmp_path):
    from pipeline.runs.config import read_config

    run = next(r for r in selection_runs(campaign) if r.place.method == "B")
    values, problems = read_config(str(tmp_path / "run.yaml"), run.overrides)
    assert problems == []
    assert values["prune"]["method"] == {"name": "mgpp", "spike_var": 1e-9}
    assert values["data"]["validation"] is None
    assert values["train"]["length"] == "2ep"


@pytest.mark.parametrize("metric", [ACCURACY, PERPLEXITY])
def test_the_best_mean_over_the_seeds_is_chosen_for_each_sparsity(campaign, metric):
    generator = np.random.default_rng(0)
    scores = {run: float(generator.random()) for run in selection_runs(campaign)}
    chosen = choose(campaign, scores, {"": metric})
    assert set(chosen) == {place(method, sparsity) for method in "AB" for sparsity in (0.5, 0.9)}
    for where, candidate in chosen.items():
        means = [
            np.mean([s for r, s in scores.items() if (r.place, r.candidate) == (where, number)])
            for number in (0, 1)
        ]
        assert candidate == (np.argmax(means) if metric.higher_is_better else np.argmin(means))
    for run in scores:
        assert was_chosen(campaign, run, chosen) == (chosen[run.place] == run.candidate)


def test_one_candidate_may_be_chosen_for_all_sparsities(tmp_path):
    selection = {**VALUES["selection"], "sparsities": [0.95]}  # none of the table's
    campaign = read(tmp_path, selection=selection)
    runs = selection_runs(campaign)
    assert {run.place.sparsity for run in runs} == {0.95}
    assert len(runs) == 2 * 2 * 2
    chosen = choose(campaign, {run: float(run.candidate) for run in runs}, {"": ACCURACY})
    assert chosen == {place(m, s): 1 for m in "AB" for s in (0.5, 0.9)}


def test_each_task_chooses_by_its_own_metric(tmp_path):
    campaign = read(tmp_path, tasks={"words": {}, "texts": {}})
    scores = {run: float(run.candidate) for run in selection_runs(campaign)}
    chosen = choose(campaign, scores, {"words": ACCURACY, "texts": PERPLEXITY})
    assert {(where.task, candidate) for where, candidate in chosen.items()} == {
        ("words", 1),
        ("texts", 0),
    }


def test_the_first_of_equals_is_chosen_and_never_one_that_diverged(campaign):
    runs = selection_runs(campaign)
    chosen = choose(campaign, dict.fromkeys(runs, 0.5), {"": ACCURACY})
    assert set(chosen.values()) == {0}
    scores = {run: math.nan if run.candidate == 0 else 0.1 for run in runs}
    for metric in (ACCURACY, PERPLEXITY):
        assert set(choose(campaign, scores, {"": metric}).values()) == {1}


def test_a_listed_run_has_its_settings_chosen_at_its_own_sparsity(tmp_path):
    campaign = read(tmp_path, runs=[{"method": "A", "sparsity": 0.99}])
    runs = selection_runs(campaign)
    assert sum(run.place == place("A", 0.99) for run in runs) == 2 * 2
    assert not any(run.place == place("B", 0.99) for run in runs)
    scores = {run: float(run.candidate) for run in runs}
    chosen = choose(campaign, scores, {"": ACCURACY})
    (listed,) = (r for r in campaign_runs(campaign, chosen) if r.place.sparsity == 0.99)
    assert "train.lr=0.2" in listed.overrides


def test_what_is_excluded_is_not_chosen_for(tmp_path):
    campaign = read(tmp_path, exclude=[{"method": "B", "sparsity": 0.9}])
    assert not any(run.place == place("B", 0.9) for run in selection_runs(campaign))


def test_without_a_choice_nothing_is_run_for_it(tmp_path):
    methods = {name: {"changes": m["changes"]} for name, m in VALUES["methods"].items()}
    campaign = read(tmp_path, methods=methods, selection=None)
    assert selection_runs(campaign) == []
    assert choose(campaign, {}, {"": ACCURACY}) == {}
    assert {run.candidate for run in campaign_runs(campaign)} == {0}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "campaigns").glob("*.yaml")), ids=str)
def test_every_run_of_the_campaigns_here_has_a_valid_configuration(path):
    from pipeline.runs.config import parse_config, read_config

    campaign = read_campaign(str(path))
    runs = [*selection_runs(campaign), *campaign_runs(campaign)]
    kinds = {(r.place[:3], r.candidate, r.selecting): r for r in runs}  # whatever seed and sparsity
    for run in kinds.values():
        values, problems = read_config(run.recipe, run.overrides)
        assert problems == []
        parse_config(values)


def test_the_lexicon_s_runs_are_those_of_the_readme():
    campaign = read_campaign(str(ROOT / "configs" / "campaigns" / "lexicon.yaml"))
    selecting, final = selection_runs(campaign), campaign_runs(campaign)
    assert (len(selecting), len(final)) == (5 * 4, 3 + 3 * 2 * 5)
    assert {(run.place.sparsity, run.seed) for run in selecting} == {(0.95, 0)}
    held_apart = 'data.arguments.validate_on="training words"'
    assert all(held_apart in run.overrides for run in selecting)
    assert not any(held_apart in run.overrides for run in final)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": None}, "selection: missing"),
        ({"methods": {**VALUES["methods"], "C": {}}}, "every method must have as many candidates"),
        ({"selection": {"changes": {}}}, "selection.changes: must have 1 or more entries"),
        ({"selection": {"changes": {"a": 1}, "seed": 0}}, "selection.seed: unknown key; allowed"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)
