"""The pruning section of the configuration: which method, how far, where and when."""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mgpp import (
    METHODS,
    ONE_SHOT,
    Allocation,
    OneShotMethod,
    Placement,
    PruningSchedule,
    make_one_shot,
)
from mgpp.masking.pattern import parse_pattern
from mgpp.pruner import check_scope
from pipeline.pruning.methods import METHOD_CONFIGS, AnyMethodConfig
from pipeline.section import Duration, Positive, Section, Share

# Keys that only mean something for some methods.
_SCHEDULED = ("initial_sparsity", "warmup", "finetune", "interval")
_PLACED = ("scope", "budgets", "min_kept", "pattern")
_CALIBRATION = ("calibration_rows",)


def _keeps_zeros(method: str) -> bool:
    return method in METHODS and METHODS[method].keeps_zeros


class PruneConfig(Section):
    """What is pruned, how far and when."""

    method: AnyMethodConfig = METHOD_CONFIGS["mgpp"](name="mgpp")
    """The pruning method."""
    start: Literal["pretrained", "dense"] = "pretrained"
    """Prune from the pretrained weights, as in the paper, or from the dense fine-tune."""
    sparsity: Share | None = Field(default=None, validate_default=True)
    """Final share of the prunable weights set to zero; `sparse-transfer` alone takes none, nor what
    follows down to interval: it keeps the zeros of the model it begins from."""
    initial_sparsity: Share = 0.0
    """Share set to zero at the first pruning."""
    warmup: Duration = Duration("10%")
    """Training before the first pruning (prune_start)."""
    finetune: Duration = Duration("10%")
    """Training after the last pruning (prune_end), with the mask fixed."""
    interval: Positive = 10
    """Steps between two prunings."""
    calibration_rows: Positive = 128
    """Training blocks that a one-shot method goes by, drawn by train.seed."""
    include: list[str] = []
    """Patterns of prunable weights; all matrices of the repeated layers unless given."""
    exclude: list[str] = []
    """Patterns of weights to leave alone."""
    scope: Literal["global", "layer", "uniform", "lamp"] = "global"
    """What competes: all weights, those of one numbered layer, or those of one matrix; lamp
    compares all by a score that no matrix's scale enters (magnitude methods; no pattern)."""
    budgets: dict[str, Share] = {}
    """Final sparsity by pattern of weights; what remains of `sparsity` goes to the others."""
    min_kept: Share = 0.0
    """Share of every matrix that stays, at least."""
    pattern: str | None = None
    """What goes together: "2:4" keeps 2 of every 4 inputs; "32x1" prunes blocks, 32 outputs x 1 input."""

    @field_validator("pattern", mode="before")
    @classmethod
    def _check_pattern(cls, value: Any) -> Any:
        if value is not None:
            try:
                parse_pattern(value)
            except (TypeError, ValueError) as error:
                raise ValueError(str(error).removeprefix("pattern: ")) from error
        return value

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None, info: ValidationInfo) -> float | None:
        method = info.data.get("method")
        if value is None and method is not None and not _keeps_zeros(method.name):
            raise PydanticCustomError("missing", "missing")
        return value

    @model_validator(mode="after")
    def _check(self) -> "PruneConfig":
        names, kind = self._meaningless()
        for name in sorted(self.model_fields_set & set(names)):
            # A default that was written out is none of the user's wishes: recorded settings hold all.
            if getattr(self, name) != type(self).model_fields[name].default:
                got = self.model_dump(mode="json")[name]
                raise ValueError(
                    f"{name} means nothing for {self.method.name}, which {kind}: got {got!r}, leave "
                    "it out"
                )
        if self.sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity ({self.initial_sparsity}) must not exceed sparsity ({self.sparsity})"
            )
        if self.method.name in METHODS:
            check_scope(METHODS[self.method.name], self.placement())
        if self.one_shot is not None:
            assert self.sparsity is not None
            self.one_shot.count(1, self.sparsity)
        return self

    def _meaningless(self) -> tuple[tuple[str, ...], str]:
        """Return the keys that mean nothing for the method, and why."""
        if self.one_shot is not None:
            return (*_SCHEDULED, *_PLACED), "prunes once, untrained"
        if _keeps_zeros(self.method.name):
            names = ("start", "sparsity", *_SCHEDULED, *_PLACED, *_CALIBRATION)
            return names, "keeps the zeros of the model it begins from"
        return _CALIBRATION, "needs no calibration"

    @property
    def one_shot(self) -> OneShotMethod | None:
        """The method, if it is one that prunes once and trains nothing."""
        return make_one_shot(self.method.model_dump()) if self.method.name in ONE_SHOT else None

    def placement(self) -> Placement:
        """Return where sparsity goes."""
        return Placement(
            scope=self.scope, budgets=self.budgets, min_kept=self.min_kept, pattern=self.pattern
        )

    def allocation(
        self, shapes: dict[str, tuple[int, ...]], transposed: Collection[str]
    ) -> Allocation:
        """Return how much of each weight goes, on the shortest schedule there is.

        Raises:
            ValueError: if that cannot be.
        """
        schedule = PruningSchedule(
            num_steps=2,
            warmup_steps=0,
            finetune_steps=0,
            interval=1,
            initial_sparsity=self.initial_sparsity,
            final_sparsity=self.sparsity or 0.0,
        )
        return Allocation(self.placement(), shapes, schedule, transposed)

    def identity(self) -> dict[str, Any]:
        """Return those settings that the result depends on.

        What places sparsity is among them only where it is not the default, so that artifacts made before
        there was such a setting keep their keys.
        """
        names, _ = self._meaningless()
        values = self.model_dump(mode="json", exclude={*names, *_PLACED})
        return values | self.placement_given()

    def placement_given(self) -> dict[str, Any]:
        """Return the settings of where sparsity goes that are not the defaults, for records and keys."""
        return self.model_dump(mode="json", include=set(_PLACED), exclude_defaults=True)

    def schedule(self, num_steps: int, steps_per_epoch: int) -> PruningSchedule:
        """Return the schedule of a run.

        Raises:
            ValueError: if prune_start is not before prune_end.
        """
        if self.sparsity is None:
            return PruningSchedule.fixed_mask(num_steps)
        lengths: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "num_steps": num_steps}
        return PruningSchedule(
            num_steps=num_steps,
            warmup_steps=self.warmup.steps(**lengths),
            finetune_steps=self.finetune.steps(**lengths),
            interval=self.interval,
            initial_sparsity=self.initial_sparsity,
            final_sparsity=self.sparsity,
        )
