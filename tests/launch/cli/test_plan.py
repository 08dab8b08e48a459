"""`mgpp plan` as it is printed, with what is assumed beside the times."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.main import app
from launch.cli.output import size_text
from tests import tiny


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


def test_evaluation_has_rows_of_its_own_and_must_fit_too(config, capfd):
    shown = printed(config, "--gpu-memory-gib", "8")
    values = planned(capfd, config, "--gpu-memory-gib", "8")
    assert values["evaluation_total"] == sum(values["evaluation"].values()) > 0
    assert f"evaluation total │ {size_text(values['evaluation_total'])} fits" in shown
    assert values["fits"]
    # Four billion tokens at a time: training still fits, evaluation does not.
    large = ["evaluate.batch_size=1000000000", "evaluate.batch_tokens=4000000000"]
    shown = printed(config, *large, "--gpu-memory-gib", "8")
    assert shown.count("DOES NOT FIT") == 1
    assert "evaluation total" in shown.split("DOES NOT FIT")[0].split("│ evaluation: ")[-1]


def test_fits_counts_evaluation(config, capfd):
    large = ["evaluate.batch_size=1000000000", "evaluate.batch_tokens=4000000000"]
    values = planned(capfd, config, *large, "--gpu-memory-gib", "8")
    assert values["device_total"] < 2**33 < values["evaluation_total"]
    assert not values["fits"]


def test_memory_of_a_node_is_planned(config, capfd):
    options = ["zero.offload_optimizer=true", "--gpu-memory-gib", "80", "--nodes", "2"]
    shown = printed(config, *options, "--node-memory-gib", "30")
    values = planned(capfd, config, *options, "--node-memory-gib", "30")
    node = values["node"]
    each = values["host_total"] - values["host"]["copy of a checkpoint"]  # made where there is room
    needed = 2 * (each + 6 * 2**30) + values["export"] + 8 * 2**30
    assert node == {"workers": 2, "needed": needed, "memory": 30 * 2**30, "fits": True}
    assert f"memory of a node, 2 workers │ {size_text(needed)} fits" in shown
    assert "DOES NOT FIT" in printed(config, *options, "--node-memory-gib", "10")
    assert "memory of a node" not in printed(config)


def refused(command, *arguments):
    done = CliRunner().invoke(app, [command, *arguments], catch_exceptions=False)
    assert done.exit_code == 2
    return " ".join(done.output.split())


def test_memory_of_nodes_that_are_not_counted_is_refused(config):
    assert "--nodes: missing" in refused("plan", config, "--node-memory-gib", "30")


@pytest.fixture
def one_shot(config, tmp_path):
    """A run in one shot of a model that no machine holds, of which there is only the configuration."""
    tiny.decoder_tokenizer().save_pretrained(tmp_path / "huge")
    tiny.config(
        "llama",
        hidden_size=32_768,
        intermediate_size=131_072,
        num_hidden_layers=80,
        num_attention_heads=256,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        pad_token_id=1,
        eos_token_id=1,
    ).save_pretrained(tmp_path / "huge")
    (tmp_path / "text.csv").write_text("text\n" + "w1 w2 w3 w4 w5 w6 w7 w8\n" * 200)
    values = yaml.safe_load(Path(config).read_text()) | {
        "model": {"path": str(tmp_path / "huge"), "random_init": True},
        "task": {"type": "causal-lm", "max_length": 16},
        "data": {"source": "files", "train": str(tmp_path / "text.csv")},
        "prune": {"sparsity": 0.5, "method": {"name": "wanda"}, "calibration_rows": 4},
        "dense": {"enabled": False},
        "cluster": {"num_workers": 1, "gpus_per_worker": 0},
        "storage": str(tmp_path / "runs"),
    }
    path = tmp_path / "one-shot.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_one_shot_that_a_node_cannot_hold_is_refused_by_plan_and_validate(one_shot):
    held = "prune.method: wanda prunes in one shot: each worker holds the whole model: "
    node = ["--nodes", "1", "--node-memory-gib", "2000"]
    said = refused("plan", one_shot, *node)
    assert held in said
    assert "for 1 worker on a node, which has 2,000.0 GiB" in said
    assert held in refused("validate", one_shot)
