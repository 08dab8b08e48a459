"""The runs of a campaign: tasks x models x methods x sparsities x seeds, as a grid or a list.

All runs share one store, so that data and dense fine-tunes are made once however many use them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.campaigns.config import DENSE, CampaignConfig, Exclusion
from pipeline.campaigns.overrides import Changes, overrides_of
from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import read_as
from pipeline.store.locations import is_file

VERSION = 2


class Place(NamedTuple):
    """Where a run's metric is in the table; those of all seeds are at one place."""

    task: str
    """Its name; empty where the campaign names none."""
    model: str
    """Its name; empty where the campaign names none."""
    method: str
    """Its name; "dense" for the model without pruning."""
    sparsity: float
    """Final; 0 for the dense model."""

    @property
    def is_pruned(self) -> bool:
        """Whether anything is pruned."""
        return self.method != DENSE

    @property
    def title(self) -> str:
        """The place, for people."""
        method = f"{self.method} {100 * self.sparsity:g}%" if self.is_pruned else self.method
        return " ".join(part for part in (self.task, self.model, method) if part)


Chosen = Mapping[Place, int]
"""The number of the candidate at each place that is pruned; the first one, 0, where a place is absent."""

NOTHING_CHOSEN: Chosen = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class CampaignRun:
    """One run of a campaign.

    Attributes:
        place: in the table.
        seed: of the run.
        candidate: number of the method's candidate.
        selecting: whether it only serves to choose a candidate.
        recipe: path of its recipe.
        overrides: `key=value` changes to the recipe.
    """

    place: Place
    seed: int
    candidate: int = 0
    selecting: bool = False
    recipe: str
    overrides: tuple[str, ...]

    @property
    def title(self) -> str:
        """The run, for people; no two runs of a campaign share it."""
        which = f" candidate {self.candidate + 1}" if self.selecting else ""
        return f"{self.place.title}{which} seed {self.seed}"


def read_campaign(path: str, overrides: Sequence[str] = ()) -> CampaignConfig:
    """Read a campaign's YAML file; each `recipe` becomes a path of its own.

    Raises:
        ConfigError: with every problem found.
    """
    config, problems = _with_recipes(read_as(CampaignConfig, path, overrides), Path(path).parent)
    runs = campaign_runs(config)
    if not any(run.place.is_pruned for run in runs):
        problems.append(Problem(path, "no runs", hint="give sparsities, or runs"))
    titles = [run.title for run in runs]
    problems += [
        Problem(title, "given twice, in the grid or in runs", where=path)
        for title in sorted({title for title in titles if titles.count(title) > 1})
    ]
    if problems:
        raise ConfigError(problems)
    return config


def _with_recipes(config: CampaignConfig, folder: Path) -> tuple[CampaignConfig, list[Problem]]:
    """Return the campaign with the paths of its recipes from here, and which of them are no files."""
    problems = []

    def found(key: str, recipe: str | None) -> str | None:
        if recipe is None:
            return None
        if not is_file(folder / recipe):
            problems.append(Problem(key, "not a file", got=str(folder / recipe)))
        return str(folder / recipe)

    tasks = {
        name: task.model_copy(update={"recipe": found(f"tasks.{name}.recipe", task.recipe)})
        for name, task in config.tasks.items()
    }
    recipe = found("recipe", config.recipe)
    return config.model_copy(update={"recipe": recipe, "tasks": tasks}), problems


def campaign_runs(config: CampaignConfig, chosen: Chosen = NOTHING_CHOSEN) -> list[CampaignRun]:
    """Return the runs of the table: the dense ones, those of the grid with a seed's together, the listed.

    Args:
        config: the campaign.
        chosen: the candidate at each place.
    """
    points = list(pruned_points(config))
    fine_tunes = dict.fromkeys((place.task, place.model, seed) for place, seed, _ in points)
    dense = [
        make_run(config, Place(task, model, DENSE, 0.0), seed) for task, model, seed in fine_tunes
    ]
    return (dense if config.dense else []) + [
        make_run(config, place, seed, candidate=chosen.get(place, 0), last=changes)
        for place, seed, changes in points
    ]


def files_of_runs(
    config: str, overrides: Sequence[str], *, campaign: bool
) -> list[tuple[str, Sequence[str]]]:
    """Return what is run, each as its YAML file and the changes to it: one run, or those of a campaign.

    Args:
        config: the YAML file of the run or campaign.
        overrides: `key=value` changes to it.
        campaign: whether it is a campaign.

    Raises:
        ConfigError: with what is wrong with the campaign.
    """
    if not campaign:
        return [(config, overrides)]
    return [(run.recipe, run.overrides) for run in campaign_runs(read_campaign(config, overrides))]


def pruned_points(config: CampaignConfig) -> Iterator[tuple[Place, int, Changes]]:
    """Yield place, seed and own changes of every pruned run of the table, in order."""
    tasks, models = list(config.tasks) or [""], list(config.models) or [""]
    for seed, task, model, sparsity, method in product(
        config.seeds, tasks, models, config.sparsities, config.methods
    ):
        place = Place(task, model, method, sparsity)
        if not any(_agrees(exclusion, place, seed) for exclusion in config.exclude):
            yield place, seed, {}
    for run in config.runs:
        yield (
            Place(run.task or "", run.model or "", run.method, run.sparsity),
            run.seed,
            run.changes,
        )


def make_run(
    config: CampaignConfig,
    place: Place,
    seed: int,
    *,
    candidate: int = 0,
    selecting: bool = False,
    last: Changes | None = None,
) -> CampaignRun:
    """Return the run at a place.

    Args:
        config: the campaign.
        place: in the table.
        seed: of the run.
        candidate: number of the method's candidate.
        selecting: whether the changes of the selection are made, too.
        last: changes over all others.
    """
    task = config.tasks.get(place.task)
    recipe = (task.recipe if task else None) or config.recipe
    assert recipe is not None
    own: list[dict[str, Any]] = [{"dense.enabled": True}]
    if place.is_pruned:
        method = config.methods[place.method]
        own = [method.changes, method.candidates[candidate]]
        if selecting and config.selection:
            own.append(config.selection.changes)
        own.append({"prune.sparsity": place.sparsity})
    return CampaignRun(
        place=place,
        seed=seed,
        candidate=candidate,
        selecting=selecting,
        recipe=recipe,
        overrides=overrides_of(
            task.changes if task else {},
            config.models.get(place.model, {}),
            config.changes,
            *own,
            last or {},
            {"train.seed": seed},
        ),
    )


def _agrees(exclusion: Exclusion, place: Place, seed: int) -> bool:
    found = {**place._asdict(), "seed": seed}
    return all(
        found[name] == value for name, value in exclusion.model_dump(exclude_none=True).items()
    )
