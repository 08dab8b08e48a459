"""What fails in a step, as one worker alone sees it; several are in test_model_files.py."""

import errno

import pytest

from pipeline.errors import StageError
from pipeline.saving.agreement import Agreement
from pipeline.worker_group import WorkerGroup


def fail(error):
    with Agreement(WorkerGroup.alone(), lambda: None) as together:
        with together.step("think"):
            pass
        with together.step("write"):
            raise error


def test_full_storage_is_said_in_the_users_terms():
    with pytest.raises(StageError, match=r"^worker 0 could not write: OSError: .*No space left"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StageError, match="worker 0 could not write: StageError: no"):
        fail(StageError("no"))


@pytest.mark.parametrize("error", [ConnectionError("away"), KeyError("wrong")])
def test_another_error_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error
