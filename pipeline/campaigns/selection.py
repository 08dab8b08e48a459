"""Methods compared on one budget: every method, sparsity and seed is a cell, a run of one recipe.

What a method's settings should be is chosen first, among as many candidates for each method, by cells
whose validation rows are a part of the training rows: the rows that the table is about are then seen by
nothing but the final cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from pydantic import Field, model_validator

from pipeline.campaigns.overrides import Changes, overrides_of
from pipeline.errors import ConfigError, Problem
from pipeline.runs.config import read_as
from pipeline.section import NotNegative, Positive, Section, Share

VERSION = 2
DENSE = "dense"


class SelectionConfig(Section):
    """How a method's candidate is chosen."""

    changes: Changes = Field(min_length=1)
    """Changes that make a part of the training rows the validation rows."""
    seeds: list[NotNegative] = Field(default=[0], min_length=1)
    """Seeds over which a candidate's metric is averaged."""
    sparsities: list[Share] | None = None
    """At which it is chosen, by the mean over them, for all; null chooses for each sparsity apart."""


class ContenderConfig(Section):
    """One method of a comparison."""

    changes: Changes = {}
    """Changes to the recipe that make it this method."""
    candidates: list[Changes] = Field(default=[{}], min_length=1)
    """Further changes, of which the best are chosen."""


class ComparisonConfig(Section):
    """Methods, sparsities and seeds, each combination a cell."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the comparison, in its table and plot."""
    recipe: str
    """The run that every cell is a change of; relative to this file."""
    storage: str = "runs"
    """Where artifacts go: a folder, or an fsspec URL."""
    changes: Changes = {}
    """Changes to the recipe for all cells, nested as there or by dotted keys."""
    sparsities: list[Share] = Field(min_length=1)
    """Final sparsities."""
    seeds: list[NotNegative] = Field(min_length=1)
    """Seeds of the final cells."""
    selection: SelectionConfig | None = None
    """How candidates are chosen; needed where methods have more than one."""
    methods: dict[str, ContenderConfig] = Field(min_length=1)
    """The methods by the name they have in the table."""
    cells_at_once: Positive = 1
    """How many cells run at a time."""

    @model_validator(mode="after")
    def _check(self) -> "ComparisonConfig":
        numbers = {name: len(method.candidates) for name, method in self.methods.items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"every method must have as many candidates, got {numbers}")
        if max(numbers.values()) > 1 and self.selection is None:
            raise ValueError(
                "selection is missing: it says how one of several candidates is chosen"
            )
        if DENSE in self.methods:
            raise ValueError(f"{DENSE!r} is the model without pruning and no name of a method")
        return self


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a comparison.

    Attributes:
        method: its name in the table; "dense" for the model without pruning.
        sparsity: final; 0 for the dense model.
        seed: of the run.
        candidate: number of the method's candidate.
        selecting: whether it only serves to choose a candidate.
        overrides: `key=value` changes to the recipe.
    """

    method: str
    sparsity: float
    seed: int
    candidate: int
    selecting: bool
    overrides: tuple[str, ...]

    @property
    def is_pruned(self) -> bool:
        """Whether anything is pruned."""
        return self.method != DENSE

    @property
    def title(self) -> str:
        """What people are told of it."""
        which = f" candidate {self.candidate + 1}" if self.selecting else ""
        place = f" {self.sparsity:.0%}" if self.is_pruned else ""
        return f"{self.method}{place}{which} seed {self.seed}"


Chosen = Mapping[tuple[str, float], int]
"""The candidate of each method at each sparsity."""


def read_comparison(path: str, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Read a comparison's YAML file; its `recipe` becomes a path of its own.

    Raises:
        ConfigError: with every problem found.
    """
    config = read_as(ComparisonConfig, path, overrides)
    recipe = Path(path).parent / config.recipe
    if not recipe.is_file():
        raise ConfigError([Problem("recipe", f"{recipe} is not a file")])
    return config.model_copy(update={"recipe": str(recipe)})


def first_candidates(config: ComparisonConfig) -> Chosen:
    """Return the first candidate of each method at each sparsity, for what any would do."""
    return {(method, sparsity): 0 for method in config.methods for sparsity in config.sparsities}


def selection_cells(config: ComparisonConfig) -> list[Cell]:
    """Return the cells that candidates are chosen by; none where there is no choice."""
    selection = config.selection
    if selection is None or all(len(m.candidates) == 1 for m in config.methods.values()):
        return []
    return [
        _cell(config, method, sparsity, seed, candidate, selecting=True)
        for seed in selection.seeds
        for sparsity in selection.sparsities or config.sparsities
        for method, contender in config.methods.items()
        for candidate in range(len(contender.candidates))
    ]


def final_cells(config: ComparisonConfig, chosen: Chosen) -> list[Cell]:
    """Return the cells of the table, the dense models among them."""
    dense = [
        Cell(
            method=DENSE,
            sparsity=0.0,
            seed=seed,
            candidate=0,
            selecting=False,
            overrides=overrides_of(config.changes, {"train.seed": seed, "dense.enabled": True}),
        )
        for seed in config.seeds
    ]
    return dense + [
        _cell(config, method, sparsity, seed, chosen[method, sparsity], selecting=False)
        for seed in config.seeds
        for sparsity in config.sparsities
        for method in config.methods
    ]


def _cell(
    config: ComparisonConfig,
    method: str,
    sparsity: float,
    seed: int,
    candidate: int,
    *,
    selecting: bool,
) -> Cell:
    contender = config.methods[method]
    overrides = overrides_of(
        config.changes,
        contender.changes,
        contender.candidates[candidate],
        config.selection.changes if selecting and config.selection else {},
        {"prune.sparsity": sparsity, "train.seed": seed},
    )
    return Cell(
        method=method,
        sparsity=sparsity,
        seed=seed,
        candidate=candidate,
        selecting=selecting,
        overrides=overrides,
    )


def choose(
    config: ComparisonConfig, scores: Mapping[Cell, float], *, higher_is_better: bool
) -> dict[tuple[str, float], int]:
    """Choose each method's candidate: the best mean over the seeds of the selection; the first of equals.

    Args:
        config: the comparison.
        scores: the metric of each selection cell.
        higher_is_better: whether a larger metric is better.
    """
    sign = 1 if higher_is_better else -1
    chosen = {}
    together = config.selection is not None and config.selection.sparsities is not None
    for method, contender in config.methods.items():
        for sparsity in config.sparsities:
            means = [
                mean(
                    sign * score
                    for cell, score in scores.items()
                    if cell.method == method
                    and cell.candidate == candidate
                    and (together or cell.sparsity == sparsity)
                )
                if len(contender.candidates) > 1
                else 0.0
                for candidate in range(len(contender.candidates))
            ]
            chosen[method, sparsity] = means.index(max(means))
    return chosen


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A method at a sparsity, over the seeds.

    Attributes:
        method: its name.
        sparsity: final.
        values: the metric by seed, in the order of the seeds.
        settings: the changes of the candidate that was chosen.
    """

    method: str
    sparsity: float
    values: tuple[float, ...]
    settings: Changes

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds; 0 with a single one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


def table(config: ComparisonConfig, chosen: Chosen, scores: Mapping[Cell, float]) -> list[TableRow]:
    """Return the rows of the table: the dense model first, then each sparsity, the methods as given."""
    places = [(DENSE, 0.0), *((m, s) for s in config.sparsities for m in config.methods)]
    return [
        TableRow(
            method=method,
            sparsity=sparsity,
            values=tuple(
                score
                for cell, score in scores.items()
                if (cell.method, cell.sparsity) == (method, sparsity)
            ),
            settings=(
                {}
                if method == DENSE
                else config.methods[method].candidates[chosen[method, sparsity]]
            ),
        )
        for method, sparsity in places
    ]
