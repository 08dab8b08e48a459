"""The pruning section of the configuration: which method, how far and when."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, create_model, model_validator

from mgpp import (
    METHODS,
    ONE_SHOT,
    Method,
    OneShotMethod,
    PruningSchedule,
    make_method,
    make_one_shot,
    settings_of,
)
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
_GRADUAL = ("initial_sparsity", "warmup", "finetune", "interval")
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

    def identity(self) -> dict[str, Any]:
        """Return those settings that the result depends on."""
        meaningless = _GRADUAL if self.one_shot else _CALIBRATION
        return self.model_dump(mode="json", exclude=set(meaningless))

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
