"""The `prune` section of the configuration: the settings of mgpp, and two of the pipeline."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import ConfigDict, Field, create_model, field_validator, model_validator

import mgpp
from mgpp import Allocation, OneShotMethod, PruningConfig, PruningSchedule
from mgpp.pattern import parse_pattern
from mgpp.settings import default_of
from pipeline.errors import Problem, SettingError
from pipeline.pruning.methods import METHOD_CONFIGS, AnyMethodConfig
from pipeline.section import Duration, GeneratedSection, Positive, Section


def _settings_section() -> type[Any]:
    """Return a section with the settings of `PruningConfig`: their types, limits and descriptions."""
    settings: dict[str, Any] = {}
    for entry in mgpp.settings_of(PruningConfig):
        kind, default = entry.type, default_of(entry)
        if mgpp.Duration in get_args(kind):
            kind, default = Duration, Duration(default)
        settings[entry.name] = (kind, Field(default=default, **entry.metadata))
    made: type[Any] = create_model("PruningSettings", __base__=GeneratedSection, **settings)
    return made


if TYPE_CHECKING:
    _Settings = Section
else:
    _Settings = _settings_section()


class PruneSection(_Settings):
    """What is pruned, how far and when: the settings of `mgpp.PruningConfig` and two of the pipeline."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    method: AnyMethodConfig = METHOD_CONFIGS["mgpp"](name="mgpp")
    """The pruning method."""
    start_from: Literal["pretrained", "dense"] = "pretrained"
    """Prune from the pretrained weights, as in the paper, or from the dense fine-tune."""
    calibration_rows: Positive = 128
    """Training blocks that a one-shot method is calibrated on, drawn by train.seed."""

    @field_validator("pattern", mode="before", check_fields=False)
    @classmethod
    def _check_pattern(cls, value: Any) -> Any:
        if value is not None:
            try:
                parse_pattern(value)
            except (TypeError, ValueError) as error:
                why = str(error).removeprefix("pattern: ")
                raise SettingError(Problem("", why)) from error
        return value

    @model_validator(mode="after")
    def _check(self) -> "PruneSection":
        try:
            settings = self.settings
        except ValueError as error:
            raise setting_error(str(error)) from error
        if settings.keep_zeros and self.start_from == "dense":
            raise SettingError(
                Problem(
                    "keep_zeros",
                    "the dense fine-tune, from which prune.start_from: dense starts, keeps no zeros",
                    got=True,
                    hint="start from the pruned model (start_from: pretrained)",
                )
            )
        for name in sorted(self._meaningless(settings) & self.model_fields_set):
            # A default that was written out is none of the user's wishes: recorded settings hold all.
            if getattr(self, name) != type(self).model_fields[name].default:
                reason = (
                    "needs no calibration"
                    if settings.meaningless() == ()
                    else "keeps the zeros of the model it starts from"
                )
                raise SettingError(
                    Problem(
                        name,
                        f"means nothing for {self.method.name}, which {reason}",
                        got=getattr(self, name),
                        hint="leave it out",
                    )
                )
        return self

    def _meaningless(self, settings: PruningConfig) -> set[str]:
        """Return those of the pipeline's own settings that mean nothing for the method."""
        if settings.one_shot is not None:
            return set()
        return {"calibration_rows"} | ({"start_from"} if settings.sparsity is None else set())

    @property
    def settings(self) -> PruningConfig:
        """The settings of pruning.

        Raises:
            ValueError: "<setting>: ..." if one is wrong.
        """
        names = [entry.name for entry in mgpp.settings_of(PruningConfig)]
        values = {name: getattr(self, name) for name in names}
        return PruningConfig(**{**values, "method": self.method.model_dump()})

    @property
    def one_shot(self) -> OneShotMethod | None:
        """The method, if it is one that prunes once and trains nothing."""
        return self.settings.one_shot

    def allocation(
        self, shapes: dict[str, tuple[int, ...]], transposed: Collection[str]
    ) -> Allocation:
        """Return how many elements of each weight are pruned, on the shortest schedule there is.

        Raises:
            ValueError: if that cannot be.
        """
        settings = self.settings
        schedule = PruningSchedule(
            num_steps=2,
            warmup_steps=0,
            finetune_steps=0,
            interval=1,
            initial_sparsity=settings.initial_sparsity,
            final_sparsity=settings.sparsity or 0.0,
        )
        return Allocation(settings.placement(), shapes, schedule, transposed)

    def placement_given(self) -> dict[str, Any]:
        """Return the settings of where sparsity goes that are not the defaults, for records."""
        return self.model_dump(mode="json", include=set(_PLACED), exclude_defaults=True)


_PLACED = ("scope", "budgets", "min_kept", "pattern")


def setting_error(message: str) -> SettingError:
    """Return an error of one setting of a section, from "<setting>: <message>"."""
    key, _, text = message.partition(": ")
    if not key.isidentifier():
        key, text = "", message
    return SettingError(Problem(key, text))
