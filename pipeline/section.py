"""The base of every section of the configuration, and the types several of them share."""

from collections.abc import Collection, Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

import mgpp
from pipeline.errors import Problem, SettingError

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
OneOrMore = Annotated[
    Annotated[list[str], Field(min_length=1)],
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=str | list[str],
    ),
]


_FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)  # smallest normal and largest magnitude
_EXACT = 2**53  # whole numbers below it are the same as floats
_INT64 = 2**63


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know and values of another type.

    A number is a number and no boolean and no text; a whole one may be written as 1e3.

    Attributes:
        not_in_key: settings that what is made depends on at most by rounding.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
    not_in_key: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _in_our_types(cls, given: Any) -> Any:
        """Return 1e3 as 1000 where a whole number is asked, and a list where a tuple is."""
        if not isinstance(given, Mapping):
            return given
        specs = cls.model_fields
        return {
            name: _in_type(name, value, specs[name].annotation) if name in specs else value
            for name, value in given.items()
        }

    @field_validator("*", mode="after")
    @classmethod
    def _representable(cls, value: Any) -> Any:
        """Refuse numbers that are infinite, or nothing, in the types that computations are in."""
        if isinstance(value, float) and value and not _FLOAT32[0] <= abs(value) <= _FLOAT32[1]:
            raise ValueError("must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38")
        if isinstance(value, int) and abs(value) >= _INT64:
            raise ValueError("must be below 2**63")
        return value

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


class GeneratedSection(Section):
    """A section whose settings are made by code, with their descriptions.

    Looking for descriptions in the source of a class that has none takes seconds where many modules are
    loaded.
    """

    model_config = ConfigDict(use_attribute_docstrings=False)


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the section classes inside an annotation, such as the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def _in_type(name: str, value: Any, annotation: Any) -> Any:
    kinds = _kinds_in(annotation)
    if isinstance(value, float) and int in kinds and float not in kinds:
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    if isinstance(value, bool) and Literal in kinds and bool not in kinds:
        # `True == 1`, and a Literal compares.
        raise SettingError(Problem(name, "must not be a boolean", got=value))
    return value


def _kinds_in(annotation: Any) -> set[Any]:
    """Return the types of the values that a setting takes, not of what lies within them."""
    if annotation is Any:
        return set()
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds_in(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(_kinds_in, get_args(annotation)))
    return {origin or annotation}


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
                    "pattern": r"^([0-9]+|[0-9]+(\.[0-9]+)?(ep|%))$",
                },
            ],
            "description": "Steps (500), epochs ('2ep') or a share of all steps ('10%').",
        }
