"""What a person sees of a run, word for word as it came."""

import time

from launch.cli.output import narrator
from launch.driver.progress import StageDisplay, describe

RECORD = {"step": 3, "num_steps": 8, "loss": 0.5}


def shown(notes, capsys):
    records = {"prune": RECORD}
    with StageDisplay(["dense", "prune"], narrator(), lambda: (records, notes)) as display:
        time.sleep(0.1)
    return display, capsys.readouterr().err.splitlines()


def test_words_in_brackets_are_no_markup(capsys):
    # As gloo says that a worker is gone.
    note = "workers lost ([/src/gloo/transport/tcp/pair.cc:537] Connection closed by [bold]peer)"
    _, lines = shown([note], capsys)
    assert f"dense     {note}" in lines


def test_a_long_line_stays_one(capsys):
    note = "x" * 400
    _, lines = shown([note], capsys)
    assert f"dense     {note}" in lines


def test_every_stage_is_told_and_timed(capsys):
    display, lines = shown([], capsys)
    assert lines[0] == "dense     starting"
    assert lines[1].startswith("dense     done in ")
    assert lines[2:4] == ["prune     starting", "prune     step 4/8  loss 0.5000"]
    assert lines[4].startswith("prune     done in ")
    assert set(display.seconds) == {"dense", "prune"}


def test_rounds_of_writing_are_no_steps():
    record = {"event": "write", "step": 2, "num_steps": 526}
    assert describe(record) == "writing the model: round 3/526"


def test_rows_are_counted_with_the_time_left():
    record = {"event": "rows", "what": "tokenize train", "done": 1200, "total": 45000}
    assert describe(record) == "tokenize train  1,200/45,000 rows"
    assert describe(record | {"seconds_left": 754.6}) == (
        "tokenize train  1,200/45,000 rows  12:34 left"
    )


def test_a_failure_is_told(capsys):
    try:
        with StageDisplay(["prune"], narrator(), lambda: ({}, [])):
            raise ValueError
    except ValueError:
        pass
    assert capsys.readouterr().err.splitlines()[-1].startswith("prune     failed in ")
