"""Gradients as the optimizer is given them, on 2, 3 and 4 ranks, against float64; timeouts of groups."""

import json

import pytest

from tests.cases import launch_cases
from tests.pipeline.training.gradients_worker import CASES, NUMEL, TIMEOUT, WORLDS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]  # one launch for all cases


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    return launch_cases(
        "tests.pipeline.training.gradients_worker",
        str(folder),
        cases=[*CASES, "timeouts"],
        folder=folder,
        num_processes=sum(WORLDS),
        timeout=350,
    )


def read(launched, case, world_size):
    folder = launched.folder(case)
    files = [folder / f"{case}-{world_size}-{rank}.json" for rank in range(world_size)]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("-fp32")])
def test_gradients_are_summed_in_float32_by_default(launched, case, world_size):
    found = read(launched, case, world_size)
    copies = world_size if CASES[case]["stage"] == 0 else 1
    assert sum(rank["numel"] for rank in found) == NUMEL * copies
    # A float32 sum of at most 16 numbers: each addition rounds by 2^-24 of a partial sum.
    assert max(rank["error"] for rank in found) < 2e-6


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("-fp32")])
def test_the_option_rounds_them_to_the_precision(launched, case, world_size):
    error = max(rank["error"] for rank in read(launched, case, world_size))
    assert (5e-3 if "bf16" in case else 6e-4) < error < (1e-1 if "bf16" in case else 1e-2)


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_process_group_has_the_timeout(launched, world_size):
    for timeouts in read(launched, "timeouts", world_size):
        # The default one, DeepSpeed's copy of it, its halves for hpZ, and a device mesh's.
        assert len(timeouts) >= (4 if world_size % 2 == 0 else 3)
        assert set(timeouts.values()) == {TIMEOUT}
