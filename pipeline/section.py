"""The base of every section of the configuration, and the types several of them share."""

from collections.abc import Collection
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import core_schema

import mgpp

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
OneOrMore = Annotated[
    list[str],
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=str | list[str],
    ),
]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know.

    Attributes:
        not_in_key: settings that what is made depends on at most by rounding.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
    not_in_key: ClassVar[frozenset[str]] = frozenset()

    def given(
        self, names: Collection[str] | None = None, *, defaults: bool = False
    ) -> dict[str, Any]:
        """Return settings as JSON values: those that have no default, or another value.

        Sections within are reduced alike, so one at its defaults is left out, but what says which kind of
        section it is (`prune.method.name`) has no default and stays.

        Args:
            names: of the settings; all but `not_in_key` unless given.
            defaults: give also those at their defaults.
        """
        kind = type(self)
        if names is None:
            names = set(kind.model_fields) - self.not_in_key
        as_json = self.model_dump(mode="json", include=set(names))
        if defaults:
            return as_json
        specs = kind.model_fields
        return {
            name: _reduced(getattr(self, name), value)
            for name, value in as_json.items()
            if specs[name].is_required()
            or not _is_default(
                getattr(self, name), specs[name].get_default(call_default_factory=True)
            )
        }


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the section classes inside an annotation, such as the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, Section):
        return type(value) is type(default) and not value.given()
    return bool(value == default)


def _reduced(value: Any, as_json: Any) -> Any:
    """Return a setting's JSON value, the sections in it without their defaults."""
    if isinstance(value, Section):
        return value.given()
    if isinstance(value, list):
        return [_reduced(*pair) for pair in zip(value, as_json, strict=True)]
    return as_json


class Duration(mgpp.Duration):
    """A length of training in a section: steps (`500`), epochs (`"2ep"`) or a share (`"10%"`)."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def parse(value: Any) -> "Duration":
            return value if isinstance(value, cls) else cls(value)

        return core_schema.no_info_plain_validator_function(
            parse,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda d: d.text),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                {
                    "type": "string",
                    "pattern": r"^(\d+|\d+(\.\d+)?(ep|%))$",
                },
            ],
            "description": "Steps (500), epochs ('2ep') or a share of all steps ('10%').",
        }
