"""Campaigns: models x tasks x methods x sparsities x seeds, each combination a run, as a grid or a list.

All runs meet on one store, so that data and dense fine-tunes are made once however many use them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipeline.campaigns.overrides import Changes, overrides_of
from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import read_as
from pipeline.section import NotNegative, Positive, Section, Share

VERSION = 1
DENSE = "dense"

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class CampaignTask(Section):
    """What models are pruned for."""

    recipe: str
    """The run that the task's cells are changes of; relative to this file."""
    changes: Changes = {}
    """Changes to it."""


class ListedCell(Section):
    """A cell that is given by itself, beside the grid or instead of it."""

    task: str
    """A key of `tasks`."""
    model: str | None = None
    """A key of `models`; null where there are none."""
    method: str
    """A key of `methods`."""
    sparsity: Share
    """Final sparsity."""
    seed: NotNegative = 0
    """Of the run."""
    changes: Changes = {}
    """Further changes."""


class Exclusion(Section):
    """Cells of the grid that are left out: all that agree with what is given here."""

    task: str | None = None
    """A key of `tasks`."""
    model: str | None = None
    """A key of `models`."""
    method: str | None = None
    """A key of `methods`."""
    sparsity: Share | None = None
    """Final sparsity."""
    seed: NotNegative | None = None
    """Of the run."""


class CampaignConfig(Section):
    """Models, tasks, methods, sparsities and seeds, each combination a run."""

    name: str = Field(pattern=_NAME)
    """Name of the campaign, in its table and report."""
    storage: str = "runs"
    """Where artifacts go: a folder that all nodes share, or an fsspec URL."""
    changes: Changes = {}
    """Changes to the recipes for all cells, nested as there or by dotted keys."""
    tasks: dict[str, CampaignTask] = Field(min_length=1)
    """The tasks by the name they have in the table, each with its recipe."""
    models: dict[str, Changes] = {}
    """Changes that make a recipe one of each model; none leaves the recipes' own."""
    methods: dict[str, Changes] = Field(min_length=1)
    """Changes that make a recipe one of each method."""
    sparsities: list[Share] = []
    """Final sparsities of the grid; none leaves the cells that are listed."""
    seeds: list[NotNegative] = Field(default=[0], min_length=1)
    """Seeds of the grid."""
    exclude: list[Exclusion] = []
    """What of the grid is left out."""
    cells: list[ListedCell] = []
    """Further cells."""
    dense: bool = True
    """Whether each task's and model's dense fine-tune is in the table, with the seeds of the grid."""
    export: bool = False
    """Whether each pruned model is exported and reported, as `mgpp run` does."""
    runs_at_once: Positive = 1
    """How many runs there are at a time, each with a worker group of its own."""

    @model_validator(mode="after")
    def _check(self) -> "CampaignConfig":
        axes: dict[str, Collection[str]] = {
            "task": self.tasks,
            "model": self.models,
            "method": self.methods,
        }
        for part, given in (("exclude", self.exclude), ("cells", self.cells)):
            for i, entry in enumerate(given):
                for axis, names in axes.items():
                    name = getattr(entry, axis)
                    if name is not None and name not in names:
                        raise ValueError(
                            f"{part}[{i}].{axis}: got {name!r}; allowed are {', '.join(names)}"
                        )
        for i, exclusion in enumerate(self.exclude):
            if not exclusion.model_dump(exclude_none=True):
                raise ValueError(f"exclude[{i}]: empty, it would leave everything out")
        for i, cell in enumerate(self.cells):
            if self.models and cell.model is None:
                raise ValueError(f"cells[{i}].model: missing; allowed are {', '.join(self.models)}")
        if DENSE in self.methods:
            raise ValueError(f"{DENSE!r} is the model without pruning and no name of a method")
        return self


@dataclass(frozen=True, kw_only=True)
class CampaignCell:
    """One run of a campaign.

    Attributes:
        task: its name in the table.
        model: its name in the table; empty where the campaign names none.
        method: its name; "dense" for the model without pruning.
        sparsity: final; 0 for the dense model.
        seed: of the run.
        recipe: path of its recipe.
        overrides: `key=value` changes to the recipe.
    """

    task: str
    model: str
    method: str
    sparsity: float
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    @property
    def is_pruned(self) -> bool:
        """Whether anything is pruned."""
        return self.method != DENSE

    @property
    def title(self) -> str:
        """What people are told of it."""
        place = f" {100 * self.sparsity:g}%" if self.is_pruned else ""
        parts = [self.task, self.model, f"{self.method}{place}", f"seed {self.seed}"]
        return " ".join(part for part in parts if part)


def read_campaign(path: str, overrides: Sequence[str] = ()) -> CampaignConfig:
    """Read a campaign's YAML file; the `recipe` of each task becomes a path of its own.

    Raises:
        ConfigError: with every problem found.
    """
    config = read_as(CampaignConfig, path, overrides)
    tasks, problems = {}, []
    for name, task in config.tasks.items():
        recipe = Path(path).parent / task.recipe
        if not recipe.is_file():
            problems.append(Problem(f"tasks.{name}.recipe", f"{recipe} is not a file"))
        tasks[name] = task.model_copy(update={"recipe": str(recipe)})
    config = config.model_copy(update={"tasks": tasks})
    cells = campaign_cells(config)
    if not any(cell.is_pruned for cell in cells):
        problems.append(Problem(path, "no cells", hint="give sparsities, or cells"))
    titles = [cell.title for cell in cells]
    problems += [
        Problem(title, "given twice, in the grid or in cells", where=path)
        for title in sorted({title for title in titles if titles.count(title) > 1})
    ]
    if problems:
        raise ConfigError(problems)
    return config


def campaign_cells(config: CampaignConfig) -> list[CampaignCell]:
    """Return all cells: the dense ones, those of the grid with a seed's together, those listed."""
    models = list(config.models) or [""]
    pruned = [
        _cell(config, task, model, method, sparsity, seed, {})
        for seed, task, model, sparsity, method in product(
            config.seeds, config.tasks, models, config.sparsities, config.methods
        )
        if not any(
            _agrees(exclusion, task, model, method, sparsity, seed) for exclusion in config.exclude
        )
    ]
    pruned += [
        _cell(
            config,
            cell.task,
            cell.model or "",
            cell.method,
            cell.sparsity,
            cell.seed,
            cell.changes,
        )
        for cell in config.cells
    ]
    places = dict.fromkeys((cell.seed, cell.task, cell.model) for cell in pruned)
    dense = [_cell(config, task, model, DENSE, 0.0, seed, {}) for seed, task, model in places]
    return (dense if config.dense else []) + pruned


def _agrees(
    exclusion: Exclusion, task: str, model: str, method: str, sparsity: float, seed: int
) -> bool:
    given = exclusion.model_dump(exclude_none=True)
    cell = {"task": task, "model": model, "method": method, "sparsity": sparsity, "seed": seed}
    return all(cell[name] == value for name, value in given.items())


def _cell(
    config: CampaignConfig,
    task: str,
    model: str,
    method: str,
    sparsity: float,
    seed: int,
    changes: Changes,
) -> CampaignCell:
    own: list[dict[str, Any]] = (
        [{"dense.enabled": True}]
        if method == DENSE
        else [config.methods[method], {"prune.sparsity": sparsity}]
    )
    return CampaignCell(
        task=task,
        model=model,
        method=method,
        sparsity=sparsity,
        seed=seed,
        recipe=config.tasks[task].recipe,
        overrides=overrides_of(
            config.tasks[task].changes,
            config.models.get(model, {}),
            config.changes,
            *own,
            changes,
            {"train.seed": seed},
        ),
    )
