"""What `auto` comes to: a GPU for every worker or none, bf16 where GPUs have it; kept once begun."""

import json
from dataclasses import replace

import pytest

from pipeline.errors import ConfigError
from pipeline.runs.config import parse_config
from pipeline.runs.flow import plan_stages
from pipeline.runs.hardware import NO_GPUS, Capacity, Choices, Hardware, described, settled
from pipeline.storage.filesystems import open_storage

CPUS = Hardware(capacity=Capacity(nodes=((8.0, 0.0),)), has_bf16=lambda: pytest.fail("no GPU"))
OLD_GPUS = Hardware(capacity=Capacity(nodes=((8.0, 2.0),) * 2), has_bf16=lambda: False)
GPUS = replace(OLD_GPUS, has_bf16=lambda: True)


@pytest.fixture
def make(tiny_bert, words_csv):
    def config(num_workers=4, precision="auto", gpus="auto", **sections):
        return parse_config(
            {
                "name": "tiny",
                "model": {"path": str(tiny_bert)},
                "task": {"type": "classification", "text": ["text"], "label": "label"},
                "data": {"source": "files", "train": str(words_csv)},
                "train": {"length": 10},
                "prune": {"sparsity": 0.5},
                "zero": {"precision": precision},
                "cluster": {"num_workers": num_workers, "gpus_per_worker": gpus},
                **sections,
            }
        )

    return config


@pytest.mark.parametrize(
    ("hardware", "num_workers", "expected"),
    [
        (CPUS, 4, (0, "fp32")),
        (GPUS, 4, (1, "bf16")),
        (GPUS, 5, (0, "fp32")),  # a GPU for each or for none
        (OLD_GPUS, 4, (1, "fp32")),
        (NO_GPUS, 1, (0, "fp32")),
    ],
)
def test_what_auto_comes_to(make, hardware, num_workers, expected):
    found = settled(make(num_workers), hardware)
    assert (found.cluster.gpus, found.zero.precision) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"gpus": 0}, (0, "fp32")),
        ({"gpus": 0, "precision": "bf16"}, (0, "bf16")),
        ({"precision": "fp32"}, (1, "fp32")),
        ({"precision": "tf32"}, (1, "tf32")),
    ],
)
def test_what_is_given_stays(make, given, expected):
    found = settled(make(**given), GPUS)
    assert (found.cluster.gpus, found.zero.precision) == expected


def test_what_it_came_to_is_in_the_key_and_auto_is_not(make):
    def keys(config):
        return {stage.name: stage.key for stage in plan_stages(config)}

    on_gpus, on_cpus = (keys(settled(make(), hardware)) for hardware in (GPUS, CPUS))
    assert on_gpus == keys(settled(make(precision="bf16"), GPUS))
    assert on_cpus == keys(settled(make(precision="fp32"), GPUS))  # where it runs changes no key
    assert on_gpus["prune"] != on_cpus["prune"]
    with pytest.raises(AssertionError, match="hardware decides"):
        plan_stages(make())


def test_a_run_that_has_begun_keeps_what_auto_came_to(make, url):
    choices = Choices(url, lambda: GPUS)
    assert not choices.has_begun(make())
    begun = choices.settle(make())
    choices.record()

    later = Choices(url, lambda: pytest.fail("asked although it has begun"))
    assert later.has_begun(make())
    assert later.settle(make()) == begun
    # Where it goes on is no matter of what is trained; what is given counts.
    moved = later.settle(make(num_workers=2, gpus=0))
    assert (moved.cluster.gpus, moved.zero.precision) == (0, "bf16")
    another = Choices(url, lambda: CPUS).settle(make(train={"length": 20}))
    assert another.zero.precision == "fp32"


def test_a_choice_that_was_not_recorded_is_made_again(make, url):
    assert Choices(url, lambda: GPUS).settle(make()).zero.precision == "bf16"
    assert Choices(url, lambda: CPUS).settle(make()).zero.precision == "fp32"


def test_two_that_begin_at_once_on_other_hardware(make, url):
    first, second = Choices(url, lambda: GPUS), Choices(url, lambda: CPUS)
    same = Choices(url, lambda: GPUS)
    for choices in (first, second, same):
        choices.settle(make())
    first.record()
    same.record()
    with pytest.raises(ConfigError, match="began the same run on other hardware"):
        second.record()


def test_the_runs_of_a_campaign_keep_one_choice(make, url):
    choices = Choices(url, lambda: GPUS)
    choices.settle(make(), campaign="grid")
    choices.record()
    later = Choices(url, lambda: CPUS)
    other_seed = make(train={"length": 10, "seed": 1})
    assert later.settle(other_seed, campaign="grid").zero.precision == "bf16"
    assert later.settle(other_seed, campaign="another").zero.precision == "fp32"


def test_tf32_needs_gpus(make, tmp_path):
    with pytest.raises(ConfigError) as caught:
        Choices(str(tmp_path), lambda: CPUS).settle(make(precision="tf32"))
    assert str(caught.value) == (
        "zero.precision: is a mode of NVIDIA GPUs, and the workers have none, got 'tf32'; use fp32"
    )


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"5", b'{"foo": 1}', b"\xff"])
def test_a_damaged_choice_is_named_and_made_again(make, url, raw):
    begun = Choices(url, lambda: GPUS)
    begun.settle(make())
    begun.record()
    filesystem, root = open_storage(f"{url}/auto")
    (path,) = filesystem.ls(root, detail=False)
    filesystem.pipe_file(path, raw)
    later = Choices(url, lambda: GPUS)
    assert not later.has_begun(make())
    assert later.settle(make()).zero.precision == "bf16"
    (warning,) = later.warnings()
    assert warning.endswith("; what `auto` comes to is chosen again")
    assert f"/{path.rpartition('/')[2]} is damaged: " in warning
    later.record()
    whole = Choices(url, lambda: CPUS)
    assert whole.settle(make()).zero.precision == "bf16"
    assert whole.warnings() == []


def test_what_is_recorded_is_readable(make, tmp_path):
    choices = Choices(str(tmp_path), lambda: GPUS)
    choices.settle(make())
    choices.record()
    (file,) = (tmp_path / "auto").iterdir()
    values = json.loads(file.read_text())
    assert {"gpus_per_worker": 1, "precision": "bf16"}.items() <= values.items()


@pytest.mark.parametrize(
    ("num_workers", "hardware", "text"),
    [
        (1, CPUS, "1 worker of 1 CPU core, fp32"),
        (4, GPUS, "4 workers of 1 CPU core and a GPU each, bf16"),
        (2, CPUS, "2 workers of 1 CPU core each, fp32"),
    ],
)
def test_how_it_is_described(make, num_workers, hardware, text):
    assert described(settled(make(num_workers), hardware)) == text
