"""A case that fails fails alone: those before and after it pass, and each says what became of it."""

import pytest

from tests.cases import launch_cases

pytestmark = pytest.mark.distributed
CASES = ("first", "one", "between", "both", "last", "hung", "left")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    return launch_cases(
        "tests.failing_cases",
        str(folder),
        cases=CASES,
        folder=folder,
        num_processes=2,
        timeout=300,
        max_failures=3,
    )


@pytest.mark.parametrize("case", ["first", "between", "last"])
def test_a_case_among_failing_ones_passes_once_on_every_rank(launched, case):
    assert (launched.folder(case) / f"{case}.log").read_text() == "2\n2\n"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("one", ["rank 0 ", "in barrier", "rank 1 failed", "ValueError: only rank 1"]),
        ("both", ["rank 0 failed", "KeyError: 'rank 0'", "rank 1 failed", "KeyError: 'rank 1'"]),
        ("hung", ["rank 0 ", "in barrier", "rank 1 was running", "in wait_for_one"]),
        ("left", ["not run", "'hung'"]),
    ],
)
def test_a_failing_case_says_what_became_of_it_on_every_rank(launched, case, expected):
    with pytest.raises(AssertionError) as raised:
        launched.folder("first", case)
    text = str(raised.value)
    assert text.startswith(f"case {case}: ")
    position = 0
    for part in expected:  # in this order
        position = text.find(part, position)
        assert position >= 0, (part, text)


def test_ranks_that_begin_no_case_say_why(tmp_path):
    launched = launch_cases(
        "tests.no_such_module",
        cases=["a", "b"],
        folder=tmp_path,
        num_processes=1,
        timeout=100,
        max_failures=1,
    )
    with pytest.raises(AssertionError, match=r"case a: rank 0 had not begun(.|\n)*No module named"):
        launched.folder("a")
    with pytest.raises(AssertionError, match=r"case b: not run; before it failed \['a'\]"):
        launched.folder("b")
