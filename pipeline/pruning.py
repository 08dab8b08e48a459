"""The pruning section of the configuration: which method, how far and when."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, create_model, field_validator, model_validator

from mgpp import (
    METHODS,
    ONE_SHOT,
    Allocation,
    Method,
    OneShotMethod,
    Placement,
    PruningSchedule,
    make_method,
    make_one_shot,
    settings_of,
)
from mgpp.pattern import parse_pattern
from pipeline.section import Duration, Positive, Section, Share


class MethodConfig(Section):
    """A pruning method with its settings; the classes for each are made from the methods themselves."""

    name: str

    @model_validator(mode="after")
    def _check(self) -> "MethodConfig":
        self.build(num_examples=1)
        return self

    def build(self, *, num_examples: int) -> Method:
        """Return the method for a number of training examples."""
        return make_method(self.model_dump(), num_examples=num_examples)


class OneShotConfig(Section):
    """A one-shot method with its settings; the classes for each are made likewise."""

    name: str

    @model_validator(mode="after")
    def _check(self) -> "OneShotConfig":
        make_one_shot(self.model_dump())
        return self


def _config_class(
    name: str, method: type[Method] | type[OneShotMethod], base: type[Section]
) -> type[Any]:
    settings: dict[str, Any] = {"name": (Literal[name], ...)}
    for entry in settings_of(method):
        settings[entry.name] = (entry.type, Field(default=entry.default, **entry.metadata))
    made: type[Any] = create_model(
        f"{method.__name__}Config",
        __base__=base,
        __doc__=(method.__doc__ or "").strip().splitlines()[0],
        **settings,
    )
    return made


METHOD_CONFIGS = {
    **{name: _config_class(name, method, MethodConfig) for name, method in METHODS.items()},
    **{name: _config_class(name, method, OneShotConfig) for name, method in ONE_SHOT.items()},
}
# What only means something for methods that train, and what only does for the others.
_PLACED = ("scope", "budgets", "min_kept", "pattern")
_GRADUAL = ("initial_sparsity", "warmup", "finetune", "interval", *_PLACED)
_CALIBRATION = ("calibration_rows",)
if TYPE_CHECKING:
    AnyMethodConfig = MethodConfig
else:
    AnyMethodConfig = Annotated[
        Union[tuple(METHOD_CONFIGS.values())], Field(discriminator="name")  # noqa: UP007
    ]


class PruneConfig(Section):
    """What is pruned, how far and when."""

    method: AnyMethodConfig = METHOD_CONFIGS["mgpp"](name="mgpp")
    """The pruning method."""
    start: Literal["pretrained", "dense"] = "pretrained"
    """Prune from the pretrained weights, as in the paper, or from the dense fine-tune."""
    sparsity: Share
    """Final share of the prunable weights set to zero."""
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
    scope: Literal["global", "layer", "uniform"] = "global"
    """What competes: all weights, those of one numbered layer, or those of one matrix."""
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

    @model_validator(mode="after")
    def _check(self) -> "PruneConfig":
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity ({self.initial_sparsity}) must not exceed sparsity ({self.sparsity})"
            )
        one_shot = self.one_shot
        if one_shot is not None:
            one_shot.count(1, self.sparsity)
        refused = _GRADUAL if one_shot is not None else _CALIBRATION
        for name in sorted(self.model_fields_set & set(refused)):
            # A default that was written out is none of the user's wishes: recorded settings hold all.
            if getattr(self, name) != type(self).model_fields[name].default:
                kind = "prunes once, untrained" if one_shot else "needs no calibration"
                got = self.model_dump(mode="json")[name]
                raise ValueError(
                    f"{name} means nothing for {self.method.name}, which {kind}: got {got!r}, leave "
                    "it out"
                )
        return self

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
        meaningless = _GRADUAL if self.one_shot else _CALIBRATION
        values = self.model_dump(mode="json", exclude={*meaningless, *_PLACED})
        return values | self.placement_given()

    def placement_given(self) -> dict[str, Any]:
        """Return the settings of where sparsity goes that are not the defaults, for records and keys."""
        return self.model_dump(mode="json", include=set(_PLACED), exclude_defaults=True)

    def schedule(self, num_steps: int, steps_per_epoch: int) -> PruningSchedule:
        """Return the schedule of a run.

        Raises:
            ValueError: if prune_start is not before prune_end.
        """
        lengths: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "num_steps": num_steps}
        return PruningSchedule(
            num_steps=num_steps,
            warmup_steps=self.warmup.steps(**lengths),
            finetune_steps=self.finetune.steps(**lengths),
            interval=self.interval,
            initial_sparsity=self.initial_sparsity,
            final_sparsity=self.sparsity,
        )
