"""`mgpp plan` as it is printed, with what is assumed beside the times."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.main import app


@pytest.fixture
def config(tiny_bert, words_csv, tmp_path):
    values = {
        "name": "planned",
        "model": {"path": str(tiny_bert)},
        "task": {"type": "classification", "text": ["text"], "label": "label", "max_length": 16},
        "data": {"source": "files", "train": str(words_csv)},
        "train": {"batch_size": 8},
        "prune": {"sparsity": 0.5},
        "cluster": {"num_workers": 4},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def printed(*arguments):
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return " ".join(done.output.split())


def planned(capfd, *arguments):
    """What is written with `--json`, which leaves standard output to one line: once in a test."""
    printed(*arguments, "--json")
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_times_are_printed_with_what_is_assumed(config, capfd):
    rates = ["--bandwidth-gbit", "0.001", "--device-tflops", "0.002"]
    shown, values = printed(config, *rates), planned(capfd, config, *rates)
    seconds = values["seconds_per_step"]
    assert seconds["communication"] == pytest.approx(values["sent_per_step"] / 125_000)
    assert seconds["compute"] == pytest.approx(values["flops_per_step"] / 2e9)
    assert seconds["shortest"] == max(seconds["compute"], seconds["communication"])
    assert seconds["longest"] == seconds["compute"] + seconds["communication"]
    assert (seconds["bandwidth_gbit"], seconds["device_tflops"]) == (0.001, 0.002)
    for name, label in (
        ("compute", "compute of a step, at 0.002 TFLOP/s a device"),
        ("communication", "communication of a step, at 0.001 Gbit/s a worker"),
        ("shortest", "a step, if they overlap entirely"),
        ("longest", "a step, if they do not overlap"),
    ):
        assert f"{label} │ {seconds[name]:.3g} s" in shown


def test_without_rates_there_are_no_times(config, capfd):
    assert "of a step" not in printed(config)
    computed = printed(config, "--device-tflops", "400")
    assert "compute of a step" in computed
    assert "overlap" not in computed
    assert set(planned(capfd, config)["seconds_per_step"].values()) == {None}
