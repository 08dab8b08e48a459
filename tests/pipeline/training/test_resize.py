"""A run goes on from its checkpoint on another number of ranks, at another ZeRO stage."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.tracking.recorder import read_records
from tests.cases import launch_cases
from tests.pipeline.training.resize_worker import (
    RESUMED,
    SAVED_BY,
    STOPS,
    folder_of,
    resumed_name,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launched(tiny_bert, train_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resize")
    shutil.copytree(tiny_bert, folder / "bert")
    config = json.loads((folder / "bert" / "config.json").read_text())
    # Ranks draw dropout of their own, so runs on other numbers of ranks compare without it.
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "bert" / "config.json").write_text(json.dumps(config))
    arguments = [str(folder / "bert"), str(train_data), str(folder / "out")]
    worker = "tests.pipeline.training.resize_worker"
    launched = launch_cases(
        worker,
        "save",
        *arguments,
        cases=STOPS,
        folder=folder / "out",
        num_processes=SAVED_BY,
        timeout=200,
    )
    for num_processes in sorted({ranks for _, _, ranks, _ in RESUMED}):
        launched |= launch_cases(
            worker,
            "resume",
            *arguments,
            cases=[resumed_name(*case) for case in RESUMED if case[2] == num_processes],
            folder=folder / "out",
            num_processes=num_processes,
            timeout=200,
        )
    return launched


@pytest.mark.parametrize(("case", "stop", "ranks", "into"), RESUMED)
def test_the_masks_are_the_same_at_the_resume(launched, case, stop, ranks, into):
    out = launched.folder(case, resumed_name(case, stop, ranks, into))
    saved = np.load(out / f"{case}-{stop}-masks.npz")
    found = np.load(f"{folder_of(out, case, stop, ranks, into)}-masks.npz")
    assert set(found) == set(saved)
    assert all(np.array_equal(found[name], saved[name]) for name in saved)
    assert sum(int((~saved[name]).sum()) for name in saved) > 0


@pytest.mark.parametrize(("case", "stop", "ranks", "into"), RESUMED)
def test_the_run_ends_as_the_undisturbed_one(launched, case, stop, ranks, into):
    out = launched.folder(case, resumed_name(case, stop, ranks, into))
    folder = folder_of(out, case, stop, ranks, into)
    whole, resumed = (load_file(f / "model" / "model.safetensors") for f in (out / case, folder))
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        np.testing.assert_allclose(resumed[name], weight, rtol=0, atol=1e-5, err_msg=name)
        if stop > 14:  # the mask was fixed already
            assert np.array_equal(resumed[name] == 0, weight == 0)
    steps = read_records(folder / "metrics.jsonl")["step"]
    assert [record["step"] for record in steps] == list(range(20))
