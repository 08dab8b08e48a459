"""The pruning section of the configuration: which method, how far and when."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, ValidationInfo, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mgpp import METHODS, Method, PruningSchedule, make_method, settings_of
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


def _config_class(name: str, method: type[Method]) -> type[MethodConfig]:
    settings: dict[str, Any] = {"name": (Literal[name], ...)}
    for entry in settings_of(method):
        settings[entry.name] = (entry.type, Field(default=entry.default, **entry.metadata))
    made: type[MethodConfig] = create_model(
        f"{method.__name__}Config",
        __base__=MethodConfig,
        __doc__=(method.__doc__ or "").strip().splitlines()[0],
        **settings,
    )
    return made


METHOD_CONFIGS = {name: _config_class(name, method) for name, method in METHODS.items()}
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
    include: list[str] = []
    """Patterns of prunable weights; all matrices of the repeated layers unless given."""
    exclude: list[str] = []
    """Patterns of weights to leave alone."""

    @field_validator("start", "sparsity", "initial_sparsity", "warmup", "finetune", "interval")
    @classmethod
    def _check_method(cls, value: Any, info: ValidationInfo) -> Any:
        method = info.data.get("method")
        if method is None:  # wrong itself
            return value
        keeps_zeros = METHODS[method.name].keeps_zeros
        assert info.field_name is not None
        if keeps_zeros and value != cls.model_fields[info.field_name].default:
            raise ValueError(
                f"{method.name} keeps the zeros of the model it begins from; leave this out"
            )
        if info.field_name == "sparsity" and value is None and not keeps_zeros:
            raise PydanticCustomError("missing", "missing")
        return value

    @model_validator(mode="after")
    def _check(self) -> "PruneConfig":
        if self.sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity ({self.initial_sparsity}) must not exceed sparsity ({self.sparsity})"
            )
        return self

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
