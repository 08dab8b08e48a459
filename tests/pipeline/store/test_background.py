"""Checkpoints on two ranks: streamed to S3, read once, written while training goes on, or not at all."""

import json

import fsspec
import pytest

from tests.cases import launch_cases
from tests.pipeline.store.checkpoint_worker import CASES, LARGE_STATE_MIB

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(bucket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return launch_cases(
        "tests.pipeline.store.checkpoint_worker",
        bucket,
        str(folder),
        cases=CASES,
        folder=folder,
        num_processes=2,
        timeout=200,
    )


def found(saved, case):
    folder = saved.folder(case)
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("how", ["foreground", "background"])
def test_nothing_is_written_locally_and_all_is_read_back_once(saved, how):
    """The ranks may write no file beyond 64 KiB."""
    ranks = found(saved, f"streamed-{how}")
    assert [rank["step"] for rank in ranks] == [2, 2]
    assert ranks[0]["size"] > LARGE_STATE_MIB * 2**20
    fetched = sum(rank["fetched"] for rank in ranks)
    assert fetched == pytest.approx(ranks[0]["size"], rel=0.05)


def test_memory_beside_the_state_is_bounded_in_the_foreground(saved):
    """One file at a time here, in parts of 5 MiB: far from the whole state."""
    state = LARGE_STATE_MIB * 2**20
    assert found(saved, "streamed-foreground")[0]["grown"] < 0.7 * state
    assert found(saved, "streamed-background")[0]["grown"] > 0.9 * state  # the copy


def test_no_upload_is_left_unfinished(saved, bucket):
    found(saved, "slow")
    filesystem = fsspec.filesystem("s3")
    assert filesystem.list_multipart_uploads(bucket.removeprefix("s3://")) == []


def test_a_slow_store_hardly_stalls_the_training(saved):
    for rank in found(saved, "slow"):
        assert rank["step"] == 2
        assert rank["steps"] > 5
        assert rank["stalled"] < 0.1 * rank["written"]


def test_an_error_in_the_background_is_raised_at_the_next_step_and_told_to_the_main_worker(saved):
    main, other = found(saved, "failed")
    assert "could not be written to" in other["error"]
    assert "make room" in other["error"]
    assert "the checkpoint of step 2 could not be written by worker 1" in main["error"]
    assert main["step"] == other["step"] == 1


def test_what_one_worker_does_not_write_in_time_is_never_complete(saved):
    main, other = found(saved, "late")
    assert "workers 1 have not written their parts" in main["error"]
    assert "error" not in other
    assert main["step"] is other["step"] is None


def test_one_is_written_at_a_time_beside_those_that_are_kept(saved):
    ranks = found(saved, "one-at-a-time")
    assert max(rank["most"] for rank in ranks) == 3
    assert {rank["left"] for rank in ranks} == {2}
