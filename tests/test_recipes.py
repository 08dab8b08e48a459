"""Every recipe: its schedule fits its data, and all its stages run, for a few steps on a tiny model."""

import json
import sys

import pytest

from pipeline.campaigns.grid import campaign_runs, read_campaign
from pipeline.errors import ConfigError
from pipeline.runs.config import parse_config, read_config
from pipeline.runs.validate import check_schedule
from pipeline.storage.hub import is_commit
from pipeline.tasks import make_task
from tests.processes import ROOT, run

pytestmark = pytest.mark.timeout(1000)  # one process runs them all

# Files whose names begin with an underscore are what others extend.
RECIPES = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not path.name.startswith("_") and path.parent.name != "campaigns"
]
# Training examples of the data sets as published (blocks and windows: about), which schedules that count
# steps and epochs are held against. Of others, schedules in one unit need no number.
NUM_EXAMPLES = {
    "nyu-mll/glue/cola": 8_551,
    "nyu-mll/glue/sst2": 67_349,
    "nyu-mll/glue/mrpc": 3_668,
    "nyu-mll/glue/stsb": 5_749,
    "nyu-mll/glue/qqp": 363_846,
    "nyu-mll/glue/mnli": 392_702,
    "nyu-mll/glue/qnli": 104_743,
    "nyu-mll/glue/rte": 2_490,
    "nyu-mll/glue/wnli": 635,
    "rajpurkar/squad/None": 88_500,
    "rajpurkar/squad_v2/None": 132_000,
}
MANY = 100_000
# Of the hub, but not by a commit: branches that the hub itself makes.
BY_BRANCH = {
    "EdinburghNLP/xsum": "refs/convert/parquet",
    "bookcorpus/bookcorpus": "refs/convert/parquet",
}
ELSEWHERE = ("run:", "package:", "dense")
# Mistakes that a recipe might have, and what of the error must name them.
MISTAKES = {
    "key": ("train: {bathc_size: 3}", "train.bathc_size: unknown key"),
    "pattern": ("prune: {include: ['*.decoder.*']}", "prune.include"),
    "freeze": ("train: {freeze: ['*.embedding.*']}", "train.freeze"),
    "architecture": ("model: {path: someone/unheard-of}", "does not tell its architecture"),
    "layout": ("zero: {stage: 2, offload_parameters: true}", "zero.offload_parameters"),
}


def read(recipe, overrides=()):
    values, problems = read_config(str(ROOT / recipe), overrides)
    assert problems == []
    return parse_config(values)


def revisions(config):
    """Return the revision of each model and data set of the hub that a run names, by its name."""
    data = config.data.parts if config.data.source == "joined" else [config.data]
    named = [(config.model.path, config.model.revision)]
    if config.distill is not None:
        named.append((config.distill.teacher, config.distill.revision))
    named += [(part.path, part.revision) for part in data if part.source == "hub"]
    return {path: revision for path, revision in named if not path.startswith(ELSEWHERE)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_the_commits_of_what_it_takes_from_the_hub(recipe):
    for path, revision in revisions(read(recipe)).items():
        assert is_commit(revision) or revision == BY_BRANCH.get(path, "a commit"), path


@pytest.mark.parametrize("campaign", sorted((ROOT / "configs" / "campaigns").glob("*.yaml")))
def test_the_runs_of_a_campaign_name_commits(campaign):
    runs = campaign_runs(read_campaign(str(campaign)))
    for run_of in {one.place[:2]: one for one in runs}.values():
        for path, revision in revisions(read(run_of.recipe, run_of.overrides)).items():
            assert is_commit(revision), path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_s_schedule_fits_its_data(recipe):
    config = read(recipe)
    data = f"{getattr(config.data, 'path', None)}/{getattr(config.data, 'name', None)}"
    check_schedule(config, NUM_EXAMPLES.get(data, MANY))


def test_no_two_recipes_have_one_name():
    names = [read(recipe).name for recipe in RECIPES]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What came of each recipe that is asked for; one process runs them all."""
    folder = tmp_path_factory.mktemp("recipes")
    asked = {
        item.callspec.params["recipe"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_a_recipe_runs"
    }
    for name, (change, _) in MISTAKES.items():
        base = f"extends: {ROOT / 'configs' / 'glue' / 'sst2.yaml'}\n"
        (folder / f"{name}.yaml").write_text(f"{base}{change}\n")
    wrong = [str(folder / f"{name}.yaml") for name in MISTAKES]
    command = [sys.executable, "-m", "tests.recipe_worker", str(folder), *wrong, *sorted(asked)]
    try:
        done = run(
            command, timeout=900, env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        )
        printed = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    except AssertionError as error:  # ran too long
        printed = str(error)
    path = folder / "found.json"
    ended = json.loads(path.read_text()) if path.exists() else {}
    lost = {"error": f"the process ended before or in it:\n{printed}"}
    return {recipe: ended.get(recipe, lost) for recipe in (*wrong, *asked)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(found, recipe):
    assert "error" not in found[recipe], found[recipe]["error"]
    config, figures = read(recipe), found[recipe]
    assert figures["prune"]["num_pruned"] > 0
    assert figures["planned"] == figures["prune"]["num_prunable"]
    assert figures["export"]["num_zeros"] >= figures["prune"]["num_pruned"]
    names = set(figures["evaluate"]["pruned"])
    task = make_task(config.task)
    assert task.headline in names
    declared = {metric.name for metric in task.metrics}
    assert {name.rpartition("/")[2] for name in names} <= declared
    if config.task.type == "masked-lm":
        assert figures["resumed"]
    assert {n.split("/")[0] for n in names if "/" in n} == set(
        getattr(config.data, "extra_validation", {})
    )


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(found, mistake):
    (result,) = (found[path] for path in found if path.endswith(f"/{mistake}.yaml"))
    assert MISTAKES[mistake][1] in result["error"]


def test_a_schedule_that_cannot_be_is_found(tmp_path):
    path = tmp_path / "late.yaml"
    base = f"extends: {ROOT / 'configs' / 'squad' / 'bert-base.yaml'}\n"
    path.write_text(f"{base}prune: {{start_after: 60000}}\n")
    with pytest.raises(ConfigError, match="prune"):
        check_schedule(read(path), NUM_EXAMPLES["rajpurkar/squad/None"])


@pytest.mark.slow
def test_rows_of_two_validation_sets_are_scored_apart(found):
    figures = found.get("configs/glue/mnli.yaml")
    if figures is None:
        pytest.skip("configs/glue/mnli.yaml was not asked for")
    for metrics in figures["evaluate"].values():
        assert [name for name in metrics if "/" not in name] == ["accuracy", "f1", "matthews"]
        assert [name for name in metrics if "/" in name] == [
            f"mismatched/{name}" for name in ("accuracy", "f1", "matthews")
        ]
    assert figures["data"]["num_rows"] == {"train": 24, "validation": 24, "mismatched": 24}
