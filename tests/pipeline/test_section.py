"""Durations in all their units, and what a section of the configuration refuses."""

import json
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.section import Duration, Section


class Training(Section):
    length: Duration = Duration("3ep")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (500, 500.0, "steps"),
        ("500", 500.0, "steps"),
        (0, 0.0, "steps"),
        ("2ep", 2.0, "ep"),
        ("0.5ep", 0.5, "ep"),
        (" 3ep ", 3.0, "ep"),
        ("10%", 10.0, "%"),
        ("2.5%", 2.5, "%"),
    ],
)
def test_a_duration_has_a_value_and_a_unit(text, value, unit):
    duration = Duration(text)
    assert (duration.value, duration.unit) == (value, unit)


def test_steps_epochs_and_shares_in_steps():
    assert Duration(500).steps(steps_per_epoch=7) == 500
    assert Duration("3ep").steps(steps_per_epoch=7) == 21
    assert Duration("0.5ep").steps(steps_per_epoch=100) == 50
    assert Duration("10%").steps(steps_per_epoch=7, num_steps=250) == 25
    assert Duration("0%").steps(steps_per_epoch=7, num_steps=250) == 0


@given(share=st.integers(0, 100), num_steps=st.integers(0, 10**6))
def test_a_share_and_the_rest_make_the_whole_run(share, num_steps):
    parts = [
        Duration(f"{part}%").steps(steps_per_epoch=1, num_steps=num_steps)
        for part in (share, 100 - share)
    ]
    assert abs(sum(parts) - num_steps) <= 1  # each is rounded by itself
    assert abs(parts[0] - share * num_steps / 100) <= 0.5


def test_a_share_of_an_unknown_run_is_refused():
    with pytest.raises(ValueError, match="'10%' is a share of the run and cannot be its length"):
        Duration("10%").steps(steps_per_epoch=7)


@pytest.mark.parametrize(
    "bad",
    ["", "ep", "%", "2 weeks", "-1", -1, "1.5", 1.5, 1e3, "1e3", "2epochs", True, False, None, [3]],
)
def test_what_is_no_length_is_refused(bad):
    with pytest.raises(ValueError, match=r"not a length; allowed are steps \(500\)"):
        Duration(bad)


def test_equal_texts_are_equal_durations():
    assert Duration(500) == Duration("500")
    assert hash(Duration(500)) == hash(Duration("500"))
    assert Duration("2ep") != Duration("2%")
    assert Duration("2ep") != "2ep"
    assert repr(Duration("2ep")) == "Duration('2ep')"


@pytest.mark.parametrize("text", [500, "500", "2ep", "0.5ep", "10%"])
def test_a_section_with_a_duration_survives_json(text):
    section = Training(length=text)
    assert section.length == Duration(text)
    dumped = json.loads(section.model_dump_json())
    assert dumped == {"length": str(text)}
    assert section.model_dump(mode="json") == dumped
    assert Training.model_validate(dumped) == section


def test_a_duration_is_taken_as_it_is():
    duration = Duration("2ep")
    assert Training(length=duration).length is duration


def test_a_bad_duration_is_a_validation_error():
    with pytest.raises(ValidationError, match="not a length") as raised:
        Training(length="3 weeks")
    assert raised.value.errors()[0]["loc"] == ("length",)
    assert raised.value.errors()[0]["input"] == "3 weeks"


def test_a_section_is_frozen_and_refuses_unknown_keys():
    section = Training()
    with pytest.raises(ValidationError, match="frozen"):
        section.length = Duration(5)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Training(lenght=5)


# The schema is for editors: what it lets through is what a file may hold.
@pytest.mark.parametrize(
    "value",
    [
        0,
        500,
        "500",
        "2ep",
        "0.5ep",
        "10%",
        "2.5%",
        -1,
        1.5,
        "1.5",
        "-1",
        "ep",
        "2 weeks",
        None,
        True,
    ],
)
def test_schema_allows_what_is_a_length(value):
    jsonschema = pytest.importorskip("jsonschema")
    schema = Training.model_json_schema()
    assert schema["properties"]["length"]["default"] == "3ep"
    try:
        Duration(value)
        is_length = True
    except ValueError:
        is_length = False
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"length": value}) == is_length


def test_what_is_given_leaves_out_defaults_at_every_depth():
    class Inner(Section):
        kind: Literal["a"]
        size: int = 3

    class Plain(Section):
        length: Duration = Duration("10%")

    class Outer(Section):
        not_in_key: ClassVar[frozenset[str]] = frozenset({"speed"})

        name: str
        inner: Inner = Inner(kind="a")
        plain: Plain = Plain()
        further: Plain | None = None
        parts: list[Inner] = []
        speed: int = 1

    assert Outer(name="x", speed=2).given() == {"name": "x", "inner": {"kind": "a"}}
    written = Outer(name="x", inner={"kind": "a", "size": 3}, plain={"length": "10%"}, parts=[])
    assert written.given() == {"name": "x", "inner": {"kind": "a"}}
    full = Outer(
        name="x",
        inner={"kind": "a", "size": 4},
        plain={"length": 5},
        further={},
        parts=[{"kind": "a", "size": 3}],
    )
    assert full.given() == {
        "name": "x",
        "inner": {"kind": "a", "size": 4},
        "plain": {"length": "5"},
        "further": {},
        "parts": [{"kind": "a"}],
    }
    assert full.given(["name", "speed"]) == {"name": "x"}
    assert full.given(["name", "speed"], defaults=True) == {"name": "x", "speed": 1}
