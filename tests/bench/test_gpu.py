"""`make gpu`: its dry run on the CPU, how it fails, and, where there is a device, its checks."""

import json
import sys

import pytest

from tests.bench.gpu import __main__ as gpu
from tests.bench.gpu.figures import Figure
from tests.bench.gpu.sizes import DRY_RUN, GPU, Part
from tests.few_packages import NEEDED, NOT_NEEDED, only
from tests.processes import run

COMMAND = [sys.executable, "-m", "tests.bench.gpu"]


@pytest.fixture
def environment(monkeypatch):
    """Have what `main` sets taken back."""
    for name in ("DS_ACCELERATOR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_dry_run_passes_where_few_packages_are_installed(tmp_path):
    out = tmp_path / "gpu.json"
    command = [*COMMAND, "--dry-run", "--out", str(out)]
    done = run(command, timeout=300, env=only(NEEDED, NOT_NEEDED))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    record = json.loads(out.read_text())
    assert record["failed_parts"] == {}
    assert set(record["seconds"]) == {part.name for part in DRY_RUN}
    assert set(record) > {"device", "torch", "deepspeed", "transformers"}
    figures = {figure["key"]: figure for figure in record["figures"]}
    assert len(figures) == len(record["figures"])
    for key, figure in figures.items():
        assert key in done.stdout
        assert figure["kept"] is not False
    assert figures["pruning_synchronizing_1b"]["limit"] == "<= 12"
    assert figures["pruning_synchronizing_1b"]["kept"]
    assert figures["step_overhead_llama-1b"]["limit"] == "<= 1.03"
    assert figures["step_overhead_llama-1b"]["kept"] is None  # a CPU's time says nothing of it
    assert figures["throughput_ratio"]["limit"] == ">= 1"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.distributed
def test_the_checks_pass_on_a_device(tmp_path):
    command = [*COMMAND, "--out", str(tmp_path / "gpu.json"), "layouts", "kernels", "batches"]
    done = run(command, timeout=500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_all_parts_take_20_minutes_at_most_and_a_dry_run_has_them_all():
    assert sum(part.seconds for part in GPU) <= 20 * 60 - 10
    assert {part.group for part in DRY_RUN} == {part.group for part in GPU}
    for parts in (GPU, DRY_RUN):
        assert len({part.name for part in parts}) == len(parts)


def test_without_a_device_it_says_so_in_a_line_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_device", lambda: None)
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_part_that_is_not_there_is_refused(capsys):
    assert gpu.main(["--dry-run", "kernel"]) == 2
    assert "no such parts: kernel" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_stops_no_other(environment, monkeypatch, capsys, tmp_path):
    values = {"raises": {"few": 3}, "killed": {}, "hangs": {}, "ends": {"many": 13, "wrong": False}}
    parts = [
        Part(
            name=name,
            module="tests.bench.failing_part",
            seconds=5 if name == "hangs" else 60,
            size={"name": name, "values": of_part},
        )
        for name, of_part in values.items()
    ]
    monkeypatch.setattr(gpu, "DRY_RUN", parts)
    monkeypatch.setattr(gpu, "_PRELOADED", "torch")
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--out", str(out)]) == 1
    said, record = capsys.readouterr().out, json.loads(out.read_text())
    assert set(record["failed_parts"]) == {"raises", "killed", "hangs"}
    assert "as planned" in record["failed_parts"]["raises"]
    assert "killed is about to end" in record["failed_parts"]["killed"]
    assert "ran longer than 5 s" in record["failed_parts"]["hangs"]
    kept = {figure["key"]: figure["kept"] for figure in record["figures"]}
    assert kept == {"raises_few": True, "ends_many": False, "ends_wrong": False}
    assert "not as it must be: raises, killed, hangs, ends_many, ends_wrong" in said


@pytest.mark.parametrize(
    ("value", "limit", "of_device", "kept"),
    [
        (1.02, "<= 1.03", False, True),
        (1.04, "<= 1.03", False, False),
        (1.04, "<= 1.03", True, None),
        (0.9, ">= 1", False, False),
        (float("nan"), ">= 1", False, False),
        (None, "<= 1", False, None),
        (5.0, None, False, None),
        (True, None, True, True),
        (False, None, True, False),
    ],
)
def test_limits_in_a_dry_run(value, limit, of_device, kept):
    figure = Figure(key="x", text="", value=value, limit=limit, of_device=of_device)
    assert figure.is_kept(dry_run=True) is kept
    assert ("BROKEN" in figure.row(dry_run=True)[3]) == (kept is False)
