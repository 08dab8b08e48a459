"""The settings of a campaign: what its runs are made of, and how a method's settings are chosen."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field, model_validator

from pipeline.campaigns.overrides import Changes
from pipeline.errors import Problem, SettingError
from pipeline.section import Positive, Section, Seed, Share

DENSE = "dense"

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_RENAMED = {"cells_at_once": "runs_at_once", "cells": "runs"}


class CampaignTask(Section):
    """What models are pruned for."""

    recipe: str | None = None
    """The run that the task's runs are changes of, relative to this file; null takes the campaign's."""
    changes: Changes = {}
    """Changes to it."""


class CampaignMethod(Section):
    """One method; given as changes alone, it is these changes."""

    changes: Changes = {}
    """Changes that make a recipe one of this method."""
    candidates: list[Changes] = Field(default=[{}], min_length=1)
    """Further changes, of which `selection` chooses the best."""

    @model_validator(mode="before")
    @classmethod
    def _accept_changes_alone(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and not given.keys() & cls.model_fields.keys():
            return {"changes": dict(given)}
        return given


class Selection(Section):
    """How the best of a method's candidates is chosen, without the rows that the table is about."""

    changes: Changes = Field(min_length=1)
    """Changes that make a part of the training rows the validation rows."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """Seeds over which a candidate's metric is averaged."""
    sparsities: list[Share] | None = Field(default=None, min_length=1)
    """At which it is chosen, by the mean over them, for all; null chooses for each sparsity apart."""


class ListedRun(Section):
    """A run that is given by itself, beside the grid or instead of it."""

    task: str | None = None
    """A key of `tasks`; null where there are none."""
    model: str | None = None
    """A key of `models`; null where there are none."""
    method: str
    """A key of `methods`."""
    sparsity: Share
    """Final sparsity."""
    seed: Seed = 0
    """Of the run."""
    changes: Changes = {}
    """Further changes."""


class Exclusion(Section):
    """Runs of the grid that are left out: all that agree with what is given here."""

    task: str | None = None
    """A key of `tasks`."""
    model: str | None = None
    """A key of `models`."""
    method: str | None = None
    """A key of `methods`."""
    sparsity: Share | None = None
    """Final sparsity."""
    seed: Seed | None = None
    """Of the run."""


class CampaignConfig(Section):
    """Tasks, models, methods, sparsities and seeds, each combination a run."""

    name: str = Field(pattern=_NAME, max_length=100)
    """Name of the campaign, in its tables and report."""
    recipe: str | None = None
    """The run that every run is a change of, relative to this file; a task may have its own."""
    storage: str = "runs"
    """Where artifacts go: a folder that all nodes share, or an fsspec URL."""
    changes: Changes = {}
    """Changes to the recipes for all runs, nested as there or by dotted keys."""
    tasks: dict[str, CampaignTask] = {}
    """The tasks by the name they have in the table; none leaves the recipe's own."""
    models: dict[str, Changes] = {}
    """Changes that make a recipe one of each model; none leaves the recipes' own."""
    methods: dict[str, CampaignMethod] = Field(min_length=1)
    """The methods by the name they have in the table."""
    sparsities: list[Share] = []
    """Final sparsities of the grid; none leaves the runs that are listed."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """Seeds of the grid."""
    exclude: list[Exclusion] = []
    """What of the grid is left out."""
    runs: list[ListedRun] = []
    """Further runs."""
    selection: Selection | None = None
    """How candidates are chosen; needed where methods have more than one."""
    dense: bool = True
    """Whether each task's and model's dense fine-tune is in the table, with the seeds of the grid."""
    export: bool = False
    """Whether each pruned model is exported and reported, as `mgpp run` does."""
    curves: bool = False
    """Whether the report shows the training loss of each run while its sparsity rises."""
    runs_at_once: Positive = 1
    """How many runs there are at a time, each with a worker group of its own."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, given: Any) -> Any:
        for old, new in _RENAMED.items():
            if isinstance(given, Mapping) and old in given:
                raise SettingError(Problem(old, "renamed", got=given[old], hint=f"write {new}"))
        return given

    @model_validator(mode="after")
    def _check(self) -> "CampaignConfig":
        self._check_recipes()
        self._check_names()
        self._check_candidates()
        return self

    def _check_recipes(self) -> None:
        if self.recipe is None and not self.tasks:
            raise SettingError(
                Problem("recipe", "missing", hint="give it, or tasks with a recipe each")
            )
        for name, task in self.tasks.items():
            if self.recipe is None and task.recipe is None:
                raise SettingError(
                    Problem(
                        f"tasks.{name}.recipe",
                        "missing",
                        hint="give it, or recipe for all tasks",
                    )
                )

    def _check_names(self) -> None:
        axes: dict[str, Collection[str]] = {
            "task": self.tasks,
            "model": self.models,
            "method": self.methods,
        }
        for part, given in (("exclude", self.exclude), ("runs", self.runs)):
            for i, entry in enumerate(given):
                for axis, names in axes.items():
                    name = getattr(entry, axis)
                    key, allowed = f"{part}[{i}].{axis}", tuple(names) or ("none, there are none",)
                    if name is not None and name not in names:
                        raise SettingError(Problem(key, got=name, allowed=allowed))
                    if part == "runs" and names and name is None:
                        raise SettingError(Problem(key, "missing", allowed=allowed))
        for i, exclusion in enumerate(self.exclude):
            if not exclusion.model_dump(exclude_none=True):
                raise SettingError(Problem(f"exclude[{i}]", "empty, it would leave everything out"))

    def _check_candidates(self) -> None:
        if DENSE in self.methods:
            raise SettingError(
                Problem(
                    f"methods.{DENSE}",
                    f"{DENSE!r} is the model without pruning and no name of a method",
                )
            )
        numbers = {name: len(method.candidates) for name, method in self.methods.items()}
        if len(set(numbers.values())) > 1:
            raise SettingError(
                Problem(
                    "methods",
                    "every method must have as many candidates, so that none is chosen with more effort "
                    "than another",
                    got=numbers,
                )
            )
        if max(numbers.values()) > 1 and self.selection is None:
            raise SettingError(
                Problem(
                    "selection", "missing", hint="it says how one of several candidates is chosen"
                )
            )

    @property
    def has_choice(self) -> bool:
        """Whether there are candidates to choose from."""
        return any(len(method.candidates) > 1 for method in self.methods.values())
