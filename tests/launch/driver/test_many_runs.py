"""Many runs: what storage raises as one of them ends does not stop the others."""

import pytest
from botocore.exceptions import ClientError

from launch.driver.many_runs import PlannedRun, _noted
from pipeline.runs.stage import PlannedStage
from pipeline.store.artifacts import ArtifactStore

STAGE = PlannedStage(
    name="report", key="0123456789abcdef", params={}, inputs=(), on_all_workers=False
)
RUN = PlannedRun(title="MGPP 90% seed 0", config=None, stages=[STAGE])
CLIENT_ERROR = ClientError({"Error": {"Code": "Throttling", "Message": "later"}}, "PutObject")


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path))


def test_why_a_run_failed_is_noted_until_it_is_done(store):
    assert _noted(RUN, "no space", store, lambda run: "accuracy 90%") == "failed: no space"
    assert store.failure("report", STAGE.key) == "no space"
    assert _noted(RUN, "", store, lambda run: "accuracy 90%") == "accuracy 90%"
    assert store.failure("report", STAGE.key) is None


@pytest.mark.parametrize(("outcome", "result"), [("", "done"), ("no space", "failed: no space")])
def test_a_note_that_storage_does_not_take_stops_nothing(store, monkeypatch, outcome, result):
    def note_failure(*args):
        raise CLIENT_ERROR

    monkeypatch.setattr(store, "note_failure", note_failure)
    noted = _noted(RUN, outcome, store, lambda run: "accuracy 90%")
    assert noted.startswith(f"{result} ({store.url}: ClientError: ")


def test_a_mistake_is_no_matter_of_storage(store):
    with pytest.raises(KeyError):
        _noted(RUN, "", store, lambda run: {}["accuracy"])
