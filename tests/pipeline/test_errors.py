"""What is wrong with a configuration: as text for people, as data for programs, across processes."""

import json
import pickle

import pytest
from pydantic import ValidationError, model_validator

from pipeline.errors import ConfigError, Problem, SettingError
from pipeline.runs.config import problem_of
from pipeline.section import Section

UNKNOWN = Problem("train.lenght", "unknown key", allowed=("length", "lr"), hint="see the docs")


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (UNKNOWN, "train.lenght: unknown key; allowed are length, lr; see the docs"),
        (Problem("a.b", got=3, allowed=(1, 2)), "a.b: got 3; allowed are 1, 2"),
        (Problem("a.b", "must be above 1", got=None), "a.b: must be above 1, got None"),
        (Problem("a.b", got="", hint="give one"), "a.b: got ''; give one"),
        (Problem("a", "missing").within("first").within("all"), "all: first: a: missing"),
    ],
)
def test_a_problem_written_out(problem, text):
    assert str(problem) == text


def test_a_problem_as_data():
    assert UNKNOWN.as_data() == {
        "key": "train.lenght",
        "why": "unknown key",
        "allowed": ("length", "lr"),
        "hint": "see the docs",
    }
    got = Problem("a", got=None, where="run").as_data()
    assert json.loads(json.dumps(got)) == {"key": "a", "got": None, "where": "run"}


def test_errors_cross_process_borders_with_their_data():
    error = pickle.loads(pickle.dumps(ConfigError([UNKNOWN, Problem("b", "missing")])))
    assert error.problems == [UNKNOWN, Problem("b", "missing")]
    assert str(error) == f"{UNKNOWN}\nb: missing"
    assert "got" not in error.problems[0].as_data()  # not given is still not given


def test_a_setting_that_does_not_go_with_another_is_named_by_its_own_key():
    class Range(Section):
        low: int
        high: int

        @model_validator(mode="after")
        def _check(self):
            if self.low > self.high:
                raise SettingError(Problem("low", f"above high, {self.high}", got=self.low))
            return self

    class Outer(Section):
        inner: Range

    with pytest.raises(ValidationError) as caught:
        Outer(inner={"low": 2, "high": 1})
    (item,) = caught.value.errors()
    assert problem_of(item) == Problem("inner.low", "above high, 1", got=2)
