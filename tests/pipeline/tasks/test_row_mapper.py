"""Rows mapped by several processes: the same for any number of them, whatever is killed."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain

import psutil
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import StageError
from pipeline.tasks import row_mapper
from pipeline.tasks.base import token_features
from pipeline.tasks.causal_lm import CausalLM, CausalLMConfig
from pipeline.tasks.row_mapper import RowMapper
from tests.processes import ROOT
from tests.tiny import NUMBER_WORDS as WORDS
from tests.tiny import number_tokenizer

ROWS = Dataset.from_dict({"number": list(range(1000))})
FEATURES = token_features("input_ids")


def pairs(rows, places):
    """A row becomes as many as its number modulo 3, each of the number and its place."""
    made = zip(rows["number"], places, strict=True)
    return {"input_ids": [[n, place] for n, place in made for _ in range(n % 3)]}


EXPECTED = [[n, n] for n in range(1000) for _ in range(n % 3)]


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("num_proc", [1, 2, 3])
def test_rows_and_files_are_the_same_for_any_number_of_processes(tmp_path, num_proc):
    mapper = RowMapper(num_proc=num_proc, folder=tmp_path, part_bytes=400)
    made = mapper.map("tokenize", "train", ROWS, pairs, FEATURES)
    assert made["input_ids"][:] == EXPECTED
    assert made.features == FEATURES
    alone = RowMapper(part_bytes=400).map("tokenize", "train", ROWS, pairs, FEATURES)
    assert alone["input_ids"][:] == EXPECTED
    assert alone._fingerprint == made._fingerprint  # which the saved rows carry
    assert len(names(tmp_path)) == 20
    assert multiprocessing.active_children() == []


def test_a_selection_of_rows_is_mapped_by_their_places_in_it():
    chosen = [7, 3, 999, 4, 5]
    rows = RowMapper(num_proc=2, part_bytes=8).map(
        "tokenize", "train", ROWS.select(chosen), pairs, FEATURES
    )
    assert rows["input_ids"][:] == [[n, i] for i, n in enumerate(chosen) for _ in range(n % 3)]


def test_parts_that_are_whole_are_used_again_and_damaged_ones_made_again(tmp_path):
    mapper = RowMapper(num_proc=2, folder=tmp_path, part_bytes=400)
    mapper.map("tokenize", "train", ROWS, pairs, FEATURES)
    before = names(tmp_path)
    parts = sorted((tmp_path / "tokenize" / "train").iterdir())
    parts[3].unlink()
    parts[5].write_bytes(parts[5].read_bytes()[:-100])
    changed = bytearray(parts[7].read_bytes())
    changed[len(changed) // 2] ^= 1
    parts[7].write_bytes(changed)
    (parts[0].parent / ".unfinished").write_bytes(b"half a part")
    encoded, records = [], []

    def counted(rows, places):
        encoded.append(places)
        return pairs(rows, places)

    for _ in range(3):
        again = RowMapper(folder=tmp_path, progress=records.append, part_bytes=400)
        rows = again.map("tokenize", "train", ROWS, counted, FEATURES)
        assert rows["input_ids"][:] == EXPECTED
    assert sorted(places.start for places in encoded) == [150, 250, 350]
    assert [name for name in names(tmp_path) if name != ".unfinished"] == before
    notes = [record["text"] for record in records if record["event"] == "note"]
    assert notes[0] == "tokenize train: 17 of 20 parts were made before"


def test_progress_counts_rows_and_tells_the_time_left(tmp_path):
    records = []

    def slow(rows, places):
        time.sleep(0.3)
        return pairs(rows, places)

    mapper = RowMapper(num_proc=2, folder=tmp_path, progress=records.append, part_bytes=1000)
    mapper.map("tokenize", "train", ROWS, slow, FEATURES)
    assert [record["event"] for record in records] == ["rows"] * len(records)
    done = [record["done"] for record in records]
    assert done[0] == 0
    assert done[-1] == 1000
    assert done == sorted(done)
    assert len(records) <= 5  # of 8 parts that took 1.2 s
    assert all(record["seconds_left"] >= 0 for record in records[1:])
    assert records[-1]["seconds_left"] == 0


def test_what_a_process_raises_is_raised_here():
    def broken(rows, places):
        raise StageError(f"row {places.start} is broken")

    with pytest.raises(StageError, match=r"row [0-9]+ is broken"):
        RowMapper(num_proc=2, part_bytes=400).map("tokenize", "train", ROWS, broken, FEATURES)
    assert multiprocessing.active_children() == []


def test_a_process_that_is_killed_ends_the_work_with_a_reason():
    def killed(rows, places):
        if 500 in places:
            os.kill(os.getpid(), signal.SIGKILL)
        return pairs(rows, places)

    with pytest.raises(StageError, match=r"was killed.*smaller data\.num_proc"):
        RowMapper(num_proc=2, part_bytes=400).map("tokenize", "train", ROWS, killed, FEATURES)
    assert multiprocessing.active_children() == []


def test_a_disk_without_room_is_refused_after_the_first_part(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(row_mapper.shutil, "disk_usage", lambda folder: usage)
    mapper = RowMapper(num_proc=2, folder=tmp_path, part_bytes=400)
    with pytest.raises(StageError, match=r"0\.0 GB left.*make room and rerun"):
        mapper.map("tokenize", "train", ROWS, pairs, FEATURES)


def test_batches_are_small_however_unequal_rows_are():
    sizes = [10] * 2000 + [3 << 20, 3 << 20, 5] + [400 << 10] * 10
    rows = Dataset.from_dict({"text": ["x" * size for size in sizes]})
    seen = []

    def lengths(batch, places):
        seen.append((len(batch["text"]), sum(map(len, batch["text"]))))
        return {"input_ids": [[len(text)] for text in batch["text"]]}

    made = RowMapper(part_bytes=1 << 30).map("tokenize", "train", rows, lengths, FEATURES)
    assert made["input_ids"][:] == [[size] for size in sizes]
    assert all(num == 1 or (num <= 1000 and size <= 1 << 20) for num, size in seen)


# Killed, with its processes.

KILLED = """
import sys, time
from pathlib import Path
from tests.pipeline.tasks.test_row_mapper import FEATURES, ROWS, pairs
from pipeline.tasks.row_mapper import RowMapper

def slow(rows, places):
    time.sleep(0.1)
    return pairs(rows, places)

mapper = RowMapper(num_proc=2, folder=Path(sys.argv[1]), part_bytes=400)
mapper.map("tokenize", "train", ROWS, slow, FEATURES)
"""


def test_after_a_kill_no_process_is_left_and_the_next_attempt_ends_with_the_same_files(tmp_path):
    undisturbed = tmp_path / "undisturbed"
    RowMapper(folder=undisturbed, part_bytes=400).map("tokenize", "train", ROWS, pairs, FEATURES)
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.rglob("*-*.arrow"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
    finally:
        process.kill()
        process.wait(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    made = len(list(folder.rglob("*-*.arrow")))
    assert 3 <= made < 20
    records = []
    mapper = RowMapper(num_proc=3, folder=folder, progress=records.append, part_bytes=400)
    assert mapper.map("tokenize", "train", ROWS, pairs, FEATURES)["input_ids"][:] == EXPECTED
    (note,) = (record["text"] for record in records if record["event"] == "note")
    assert note == f"tokenize train: {made} of 20 parts were made before"
    whole = [name for name in names(folder) if not name.startswith(".")]
    assert whole == names(undisturbed)


# Language modelling's blocks, against the stream written out.

TEXT = st.lists(st.sampled_from([*WORDS[3:], "unknown"]), max_size=40).map(" ".join)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.one_of(st.none(), st.just("  "), TEXT), min_size=1, max_size=30),
    length=st.integers(2, 9),
    end=st.booleans(),
    part_bytes=st.integers(1, 400),
)
def test_blocks_are_those_of_the_stream(texts, length, end, part_bytes):
    tokenizer = number_tokenizer(eos_token="<end>")
    last = [WORDS.index("<end>")] * end
    documents = [[WORDS.index(w) if w in WORDS else 0 for w in (t or "").split()] for t in texts]
    stream = list(chain.from_iterable([*d, *last] for d in documents if d))
    rows = Dataset.from_dict({"text": [*texts, "one two three four one two three four"]})
    stream += [
        WORDS.index(word) for word in ["one", "two", "three", "four", "one", "two", "three", "four"]
    ] + last
    expected = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not expected:
        return
    task = CausalLM(CausalLMConfig(type="causal-lm", max_length=length, end_of_text=end))
    mapper = RowMapper(part_bytes=part_bytes)
    made = task.tokenize(DatasetDict(train=rows), tokenizer, mapper).splits["train"]
    assert made["input_ids"][:] == expected
    assert made.features == FEATURES
