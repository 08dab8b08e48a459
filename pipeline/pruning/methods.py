"""The `prune.method` key: a section for each pruning method, made from the methods themselves."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, create_model, model_validator

from mgpp import (
    METHODS,
    ONE_SHOT,
    Method,
    OneShotMethod,
    make_method,
    make_one_shot,
    settings_of,
)
from pipeline.section import GeneratedSection, Section


class MethodConfig(GeneratedSection):
    """A method that prunes while the model trains, with its settings."""

    name: str

    @model_validator(mode="after")
    def _check(self) -> "MethodConfig":
        self.build(num_examples=1)
        return self

    def build(self, *, num_examples: int) -> Method:
        """Return the method for a number of training examples."""
        return make_method(self.model_dump(), num_examples=num_examples)


class OneShotConfig(GeneratedSection):
    """A method that prunes once and trains nothing, with its settings."""

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
if TYPE_CHECKING:
    AnyMethodConfig = MethodConfig
else:
    AnyMethodConfig = Annotated[
        Union[tuple(METHOD_CONFIGS.values())], Field(discriminator="name")  # noqa: UP007
    ]
